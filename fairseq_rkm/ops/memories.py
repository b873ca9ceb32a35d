"""All memories ``c_t`` of a recurrence, differentiable, by any backend.

No backend gives them out. But ``c_t`` is a function of ``X_t``, ``h_{t-1}`` and ``c_{t-1}``, and the outputs tell all
``h_{t-1}``: a second recurrence, without feedback, has the memories as its outputs. Its inputs are ``[X_t, h_{t-1}]``
and its weights ``[W, U]``. Gradients go through both recurrences. Candidates through a kernel other than the linear one
are computed for all steps before, and are further inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_rkm.ops import anew, dispatch, exported_loop
from fairseq_rkm.ops.cells import OUTPUT, Cell
from fairseq_rkm.ops.gate_layout import gate_slices
from fairseq_rkm.ops.kernel_candidates import candidate, filters_of, sees_hidden, squared
from fairseq_rkm.ops.ngram import windows
from fairseq_rkm.ops.segments import Fresh, Reset
from fairseq_rkm.ops.weights import Weights, memory_dtype


def memories(
    output: Tensor, cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None,
    memory: Tensor | None, keep: Tensor | None, backend: str, reset: Reset | None = None, fresh: Fresh = (None, None),
    ahead: int = 0,
) -> Tensor:  # fmt: skip
    """The memory of each step of a recurrence that has run.

    The second recurrence goes by the backend that ``"auto"`` picks for it: few backends run both cells. ``"reference"``
    stays what it is. Models of 16 bits have memories of 32: it computes in float32.

    Args:
        output: the recurrence's output, ``(T, B, d)``.
        cell: the cell that ran; it and the following are the arguments that it ran with.
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        weights: its weights.
        size: d.
        hidden: ``(B, d)`` or None for zeros.
        memory: ``(B, d)`` or None for zeros.
        keep: ``(T, B)`` bool or None.
        backend: ``"auto"`` or a backend's name.
        reset: where a sequence begins anew, or None.
        fresh: the state that it begins with.
        ahead: the inputs after its step that a window holds.

    Returns:
        ``(T, B, d)``, zero at padding; float32 for inputs of 16 bits, else of the inputs' dtype.
    """
    if backend == "auto" and exported_loop.is_recording():  # a loop that is written down may show them
        mask = None if reset is None else reset.mask
        return exported_loop.recurrence(
            cell, inputs, weights, size, hidden, memory, keep, mask, fresh, ahead, memories=True
        )[0]
    wide = memory_dtype(inputs.dtype)
    backend = "reference" if backend == "reference" else "auto"
    if weights.recurrent is not None or not cell.kernel.is_linear:
        mask = None if reset is None else reset.mask
        read = [windows(inputs, inputs.size(0) - output.size(0) + 1, ahead, mask)]
        if weights.recurrent is not None:
            read.append(_previous(output, hidden, keep, mask, fresh[0]))
        if not cell.kernel.is_linear:
            read.append(_candidates(cell, [part.to(wide) for part in read], weights.widened(wide), size))
        inputs, ahead = torch.cat(read, dim=2), 0
    own = _without_output(cell, weights, size).widened(wide)
    if not cell.kernel.is_linear:
        own = _taking_candidates(own, size)
    arguments = cell.memory_alone, inputs.to(wide), own, size, None, memory, keep, backend
    if reset is None:
        return dispatch.recurrence(*arguments)[0]
    return anew.recurrence(*arguments, reset, fresh, ahead)[0]


def _without_output(cell: Cell, weights: Weights, size: int) -> Weights:
    """The weights of :attr:`~fairseq_rkm.ops.cells.Cell.memory_alone`: ``[W, U]`` and biases of all other gates."""
    rows = (len(cell.gates) - cell.output_is_gate) * size  # the output gate comes last
    matrix, bias = weights.input[:rows], None if weights.bias is None else weights.bias[:rows]
    if weights.recurrent is not None:
        parts = dict(zip(cell.recurrent_gates, weights.recurrent.split(size), strict=True))
        zeros = weights.recurrent.new_zeros(size, size)
        fed_back = [parts.get(gate, zeros) for gate in gate_slices(cell, size) if gate != OUTPUT]
        matrix = torch.cat([matrix, torch.cat(fed_back)], dim=1)
    return weights._replace(input=matrix, recurrent=None, bias=bias)


def _candidates(cell: Cell, read: list[Tensor], weights: Weights, size: int) -> Tensor:
    """``c~_t`` of all steps through the cell's kernel, ``(T, B, d)``, from all ``X_t`` and perhaps all ``h_{t-1}``."""
    matrices = [weights.input[:size]]
    if sees_hidden(cell) and weights.recurrent is not None:
        matrices.append(weights.recurrent[:size])
    seen = torch.cat(read[: len(matrices)], dim=2)
    return candidate(cell, F.linear(seen, torch.cat(matrices, dim=1)), filters_of(cell, weights), squared(seen))


def _taking_candidates(weights: Weights, size: int) -> Weights:
    """The weights for inputs with the candidates behind them."""
    own, others = weights.input.split((size, weights.input.size(0) - size))
    eye = torch.eye(size, dtype=own.dtype, device=own.device)
    taken = torch.cat([eye, eye.new_zeros(others.size(0), size)])
    matrix = torch.cat([torch.cat([torch.zeros_like(own), others]), taken], dim=1)
    bias = weights.bias
    if bias is not None:
        bias = torch.cat([torch.zeros_like(bias[:size]), bias[size:]])
    return weights._replace(input=matrix, bias=bias, kernel_scale=None, kernel_offset=None)


def _previous(
    output: Tensor, hidden: Tensor | None, keep: Tensor | None, reset: Tensor | None, fresh: Tensor | None
) -> Tensor:
    """``h_{t-1}`` of all steps, ``(T, B, d)``."""
    steps, batch, size = output.shape
    first = output.new_zeros(1, batch, size) if hidden is None else hidden.to(output.dtype).unsqueeze(0)
    if keep is None and reset is None:
        return torch.cat([first, output[:-1]]) if steps else output
    anew = output.new_zeros(1, batch, size)
    anew = anew if fresh is None else anew + fresh.to(output.dtype)
    # Entries of states: the given one, the fresh one, and each step's output. The latest event before a step decides.
    number = torch.arange(steps, device=output.device).unsqueeze(1).expand(steps, batch)
    real = number + 1 if keep is None else torch.where(keep, number + 1, 0)
    real = torch.cat([real.new_zeros(1, batch), real]).cummax(0).values[:-1]  # the last real step, counted from 1
    entry = torch.where(real > 0, real + 1, 0)
    if reset is not None:
        begun = torch.where(reset, number + 1, 0).cummax(0).values  # the last reset, counted from 1
        entry = torch.where((begun > 0) & (begun > real), 1, entry)
    states = torch.cat([first, anew, output])
    return states.gather(0, entry.unsqueeze(-1).expand(-1, -1, size))
