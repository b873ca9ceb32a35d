"""Who computes a gradient: hand-written backward passes give plain numbers, the reference differentiable ones.

Gradients may have to be differentiated again (``create_graph=True``: penalties on gradients, Hessian-vector products,
MAML). :mod:`fairseq_rkm.ops.reference` then computes the recurrence anew, and autograd differentiates it, to any order.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.ops import reference
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.passes import Gradients, Passes, Results, Saved
from fairseq_rkm.ops.plain_tensors import are_plain, obstacle
from fairseq_rkm.ops.weights import Weights, memory_dtype


def save(ctx: Any, saved: Saved) -> None:
    """Keep a recurrence's tensors for autograd's backward pass."""
    weights = saved.weights
    ctx.cell, ctx.numbers = saved.cell, [field if isinstance(field, float) else None for field in weights]
    ctx.save_for_backward(saved.keep, saved.inputs, saved.hidden, saved.memory, *weights.tensors(), *saved.own)


def load(ctx: Any) -> Saved:
    """Undo :func:`save`; call it once: ``torch.utils.checkpoint`` gives saved tensors out a single time."""
    keep, inputs, hidden, memory, *tensors = ctx.saved_tensors
    count = len(ctx.numbers)
    fields = [tensor if number is None else number for number, tensor in zip(ctx.numbers, tensors, strict=False)]
    return Saved(ctx.cell, keep, inputs, hidden, memory, Weights(*fields), tensors[count:])


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Passes compute in the dtypes of their tensors; autocast has chosen those before."""
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocast else nullcontext()


def differentiate(
    passes: Passes, by_operator: Callable[..., Gradients], saved: Saved, grads: Gradients, needs: Sequence[bool]
) -> Gradients:
    """The gradients of inputs, hidden, memory and the fields of :class:`Weights`; None where none is needed.

    Args:
        passes: a backend's.
        by_operator: the backward pass as an operator, of the same signature as the next.
        saved: what :func:`load` gives.
        grads: the gradients of output, hidden and memory; None for zeros.
        needs: True for each result that is wanted.
    """
    if grads[0] is None and grads[1] is None and grads[2] is None:
        return (None,) * len(needs)
    with without_autocast(saved.inputs.device.type):
        if torch.is_grad_enabled():
            return by_reference(saved, grads, needs)
        if are_plain(*grads):
            return passes.backward(saved, grads, needs)
        return (by_operator if obstacle(*grads) is None else by_reference)(saved, grads, needs)


def by_reference(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The gradients of inputs, initial state and weights; they have a graph where one is asked for."""
    cell = saved.cell

    def run(inputs: Any, hidden: Any, memory: Any, *fields: Any) -> Sequence[Tensor]:
        return recurrence_by_reference(cell, inputs, Weights(*fields), hidden, memory, saved.keep)

    return gradients_through(run, (saved.inputs, saved.hidden, saved.memory, *saved.weights), grads, needs)


def gradients_through(
    run: Callable[..., Sequence[Tensor]], given: Sequence[Any], grads: Gradients, needs: Sequence[bool]
) -> Gradients:
    """The gradients of a function's arguments, by autograd; they have a graph where one is asked for.

    Args:
        run: the function, of PyTorch's own operators.
        given: its arguments: tensors, numbers, None.
        grads: the gradients of its results; None for zeros.
        needs: True for each argument whose gradient is wanted; the others' is None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the graph: one argument may have been computed from another.
        views: list[Any] = [x.view_as(x) if isinstance(x, Tensor) else x for x in given]
        for view, need in zip(views, needs, strict=True):
            if need and not view.requires_grad:  # an operator's kernel gets plain numbers
                view.requires_grad_()
        results = run(*views)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    found: list[Tensor | None] = [None] * len(wanted)
    if pairs:
        outputs, given_grads = zip(*pairs, strict=True)
        dense = [g.to_dense() if g.layout != torch.strided else g for g in given_grads]
        found = list(torch.autograd.grad(outputs, wanted, dense, create_graph=create_graph, allow_unused=True))
    rest = iter(torch.zeros_like(view) if grad is None else grad for view, grad in zip(wanted, found, strict=True))
    return tuple(next(rest) if need else None for need in needs)


def zeros_for_none(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The initial state with zeros for None."""
    shape = inputs.size(1), weights.input.size(0) // len(cell.gates)
    hidden = inputs.new_zeros(shape) if hidden is None else hidden
    memory = inputs.new_zeros(shape, dtype=memory_dtype(inputs.dtype)) if memory is None else memory
    return hidden, memory


def recurrence_by_reference(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fairseq_rkm.ops.reference.recurrence`; None for an initial state is zeros."""
    hidden, memory = zeros_for_none(cell, inputs, weights, hidden, memory)
    return reference.recurrence(cell, inputs, weights, hidden, memory, keep)


def _reference_forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    return Results(*recurrence_by_reference(cell, inputs, weights, hidden, memory, keep))


def _reference_backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    # PyTorch calls an operator's kernel with autograd switched off for good; here it is wanted.
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.no_grad():
        return by_reference(saved, grads, needs)


REFERENCE = Passes(_reference_forward, _reference_backward, lambda _extent: ())
"""The reference as a backend, for its operator; elsewhere autograd sees the reference itself."""
