"""Recurrences over sequences that begin anew here and there, by any backend.

The host reads the mask and the segments run as rows of a batch (:mod:`fairseq_rkm.ops.segments`). It cannot read it in
CUDA graphs, under ``torch.func`` and while ``torch.jit`` traces: the reference then looks at the mask at each step.
``torch.compile`` and others that know operators get an operator, which reads the mask when the program runs.
"""

import torch
from torch import Tensor

from fairseq_rkm.ops import dispatch, exported_loop, reference
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.higher_derivatives import zeros_for_none
from fairseq_rkm.ops.ngram import windows
from fairseq_rkm.ops.plain_tensors import are_plain, obstacle
from fairseq_rkm.ops.problem_checks import check, laid_out
from fairseq_rkm.ops.reset_operator import ResetOperator
from fairseq_rkm.ops.segments import Fresh, Group, Reset
from fairseq_rkm.ops.weights import Weights

UNREAD = "the reset mask cannot be read here (CUDA graphs, torch.func, tracing), and it alone looks at each step"


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None, backend: str, reset: Reset, fresh: Fresh = (None, None), ahead: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.dispatch.recurrence`, with resets.

    Args:
        cell: a cell.
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        weights: its weights.
        size: d.
        hidden: ``(B, d)`` or None for zeros.
        memory: ``(B, d)`` or None for zeros.
        keep: ``(T, B)`` bool or None.
        backend: ``"auto"`` or a backend's name.
        reset: where a sequence begins anew.
        fresh: the state that it begins with.
        ahead: the inputs after its step that a window holds.

    Returns:
        The output, ``(T, B, d)``, and the final hidden state and memory, ``(B, d)`` each.

    Raises:
        RKMError: an error of :func:`fairseq_rkm.ops.dispatch.recurrence`; or a backend is named where only the
            reference can follow the mask.
    """
    if backend == "auto" and exported_loop.is_recording():
        return exported_loop.recurrence(cell, inputs, weights, size, hidden, memory, keep, reset.mask, fresh, ahead)
    if reset.nowhere:
        return dispatch.recurrence(cell, inputs, weights, size, hidden, memory, keep, backend)
    ngram = inputs.size(0) - reset.mask.size(0) + 1
    if backend != "reference" and reset.at_first_alone:
        begins = reset.mask[0].unsqueeze(1) if reset.mask.size(0) else reset.mask.new_zeros(inputs.size(1), 1)
        context = inputs[: ngram - 1 - ahead].masked_fill(begins, 0)
        inputs = torch.cat([context, inputs[ngram - 1 - ahead :]]) if ngram > 1 else inputs
        hidden, memory = (_begun(begins, *states) for states in zip((hidden, memory), fresh, strict=True))
        return dispatch.recurrence(cell, inputs, weights, size, hidden, memory, keep, backend)
    segments = None if backend == "reference" else reset.segments()
    if segments is not None:

        def run(group: Group) -> tuple[Tensor, Tensor, Tensor]:
            given = group.state(hidden, fresh[0]), group.state(memory, fresh[1]), group.keep(keep)
            return dispatch.recurrence(cell, group.inputs(inputs, ngram, ahead), weights, size, *given, backend)

        return segments.run(run)
    tensors = reset.mask, inputs, hidden, memory, keep, *weights.tensors(), *fresh
    if backend != "reference" and _operator_is_known(*tensors):
        return ANEW(backend, cell, inputs, weights, hidden, memory, keep, reset.mask, fresh, ahead)
    inputs = windows(inputs, ngram, ahead, reset.mask)
    return step_by_step(cell, inputs, weights, size, hidden, memory, keep, backend, reset.mask, fresh)


def _operator_is_known(*tensors: Tensor | None) -> bool:
    """Whether a tool looks on that takes an operator of this package as one of PyTorch's."""
    if torch.compiler.is_dynamo_compiling():
        return True
    return not are_plain(*tensors) and obstacle(*tensors) is None


def step_by_step(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None, backend: str, mask: Tensor, fresh: Fresh,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The recurrence by the reference, which looks at the mask before each step."""
    if not torch.jit.is_tracing():  # tracing warns of each comparison
        check(cell, inputs, weights, size, hidden, memory, keep)
    dispatch.pick(backend, cell, inputs, weights, UNREAD)
    inputs, weights, hidden, memory = laid_out(inputs, weights, hidden, memory)
    hidden, memory = zeros_for_none(cell, inputs, weights, hidden, memory)
    begin = [0.0 if f is None else f.to(s.dtype) for f, s in zip(fresh, (hidden, memory), strict=True)]
    return reference.recurrence(cell, inputs, weights, hidden, memory, keep, mask, (begin[0], begin[1]))


def _begun(begins: Tensor, given: Tensor | None, fresh: Tensor | None) -> Tensor | None:
    """The states, ``(B, d)``, with the fresh one where a row begins anew, ``(B, 1)``; None stands for zeros."""
    if given is None and fresh is None:
        return None
    return torch.where(begins, 0.0 if fresh is None else fresh, 0.0 if given is None else given)


ANEW = ResetOperator(recurrence)
