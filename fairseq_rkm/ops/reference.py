"""One readable time loop for all cells; it defines the right result. It is slow, and ``"auto"`` avoids it.

It computes section 4 of Liang et al. (2019), with the layer normalisation behind their Table 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_rkm.ops import kernel_candidates
from fairseq_rkm.ops.cells import CANDIDATE, FORGET, INPUT, OUTPUT, Cell
from fairseq_rkm.ops.kernel_candidates import Filters
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor, memory: Tensor, keep: Tensor | None = None,
    reset: Tensor | None = None, fresh: tuple[Tensor | float, Tensor | float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a cell over a sequence. Every backend has this signature, without ``reset`` and ``fresh``.

    Args:
        cell: a row of :data:`fairseq_rkm.ops.cells.CELLS`, perhaps without its feedback.
        inputs: extended inputs, ``(T + n - 1, B, m)``, zero at padding (see :mod:`fairseq_rkm.ops.ngram`).
        weights: matrices and bias have the inputs' dtype; the layer norm and the sigmas have the memory's.
        hidden: ``h_0``, ``(B, d)``, of the inputs' dtype.
        memory: ``c_0``, ``(B, d)``, float32 for inputs of 16 bits, else of the inputs' dtype.
        keep: ``(T, B)`` bool, True at real steps; None if all steps are real. At other steps the state stands still and
            the output is zero.
        reset: ``(T, B)`` bool, True where the state begins anew before the step; None if it nowhere does. The windows
            are then written out (:func:`fairseq_rkm.ops.ngram.windows`): n is 1.
        fresh: the hidden state and the memory that a reset begins with, ``(d,)`` each, or 0.

    Returns:
        The output, ``(T, B, d)``, and the final hidden state and memory, ``(B, d)`` each.
    """
    ngram = weights.input.size(1) // inputs.size(2)
    outputs = [inputs.new_zeros(0, *hidden.shape)]
    filters = None if cell.kernel.is_linear else kernel_candidates.filters_of(cell, weights)
    # A program recorded by torch.jit.trace has a fixed number of steps. Unbinding makes it refuse another number.
    rows = inputs.unbind()
    for t in range(len(rows) - ngram + 1):
        window = torch.cat([rows[t + ngram - 1 - k] for k in range(ngram)], dim=1)
        if reset is not None:
            begins = reset[t].unsqueeze(1)
            hidden, memory = torch.where(begins, fresh[0], hidden), torch.where(begins, fresh[1], memory)
        new_hidden, new_memory = step(cell, window, weights, hidden, memory, filters)
        if keep is None:
            hidden, memory, output = new_hidden, new_memory, new_hidden
        else:
            real = keep[t].unsqueeze(1)
            hidden = torch.where(real, new_hidden, hidden)
            memory = torch.where(real, new_memory, memory)
            output = torch.where(real, new_hidden, torch.zeros_like(new_hidden))
        outputs.append(output.unsqueeze(0))
    return torch.cat(outputs), hidden, memory


def step(
    cell: Cell, window: Tensor, weights: Weights, hidden: Tensor, memory: Tensor, filters: Filters | None = None
) -> tuple[Tensor, Tensor]:
    """``h_t`` and ``c_t``, ``(B, d)`` each, from ``X_t``, ``(B, n * m)``, ``h_{t-1}`` and ``c_{t-1}``.

    ``filters`` are those of :func:`fairseq_rkm.ops.kernel_candidates.filters_of`; None computes them. The linear kernel
    has none.
    """
    size = memory.size(1)
    if cell.kernel.is_linear:
        return update(cell, F.linear(window, weights.input, weights.bias), weights, hidden, memory, size)
    filters = kernel_candidates.filters_of(cell, weights) if filters is None else filters
    projected = F.linear(window, weights.input, kernel_candidates.product_bias(cell, weights))
    squares = kernel_candidates.squared(window)
    return update(cell, projected, weights, hidden, memory, size, filters, squares)


def update(
    cell: Cell, projected: Tensor, weights: Weights, hidden: Tensor, memory: Tensor, size: int,
    filters: Filters | None = None, squares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`step`, from ``W X_t + b``, ``(B, gates * d)``; ``size``: d.

    A kernel other than the linear one takes the candidate's ``W X_t`` without bias, the filters and ``|X_t|^2``,
    ``(B, 1)``.
    """
    a = dict(zip(cell.gates, projected.split(size, 1), strict=True))
    if weights.recurrent is not None:
        fed_back = F.linear(hidden, weights.recurrent).split(size, 1)
        for gate, term in zip(cell.recurrent_gates, fed_back, strict=True):
            a[gate] = a[gate] + term
    a = {gate: value.to(memory.dtype) for gate, value in a.items()}

    candidate = _candidate(cell, a[CANDIDATE], hidden, filters, squares)
    forget = torch.sigmoid(a[FORGET]) if cell.forget_is_gate else weights.sigma_f
    if cell.input_is_gate:
        new_memory = torch.sigmoid(a[INPUT]) * candidate
    elif cell.input_is_complement:
        new_memory = (1 - forget) * candidate
    else:
        new_memory = weights.sigma_i * candidate
    if cell.has_memory:
        new_memory = new_memory + forget * memory
    if weights.norm_weight is not None:
        new_memory = F.layer_norm(new_memory, (size,), weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)
    if cell.clip is not None:
        new_memory = new_memory.clamp(-cell.clip, cell.clip)

    output = torch.tanh(new_memory) if cell.squash_output else new_memory
    if cell.output_is_gate:
        output = torch.sigmoid(a[OUTPUT]) * output
    return output.to(hidden.dtype), new_memory


def _candidate(cell: Cell, dot: Tensor, hidden: Tensor, filters: Filters | None, squares: Tensor | None) -> Tensor:
    """What enters the memory, ``(B, d)``, from the candidate's product."""
    if filters is not None and squares is not None:
        if kernel_candidates.sees_hidden(cell):
            squares = squares + kernel_candidates.squared(hidden)
        dot = kernel_candidates.candidate(cell, dot, filters, squares)
    return torch.tanh(dot) if cell.squash_candidate else dot
