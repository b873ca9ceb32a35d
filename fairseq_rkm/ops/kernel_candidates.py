"""Candidates through a kernel other than the linear one, and their gradients: what all backends share.

The product ``w^T z`` is the linear candidate without its bias. Norms, the kernel and the bias follow pointwise.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops import pointwise_candidates
from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gradients import parameter_gradients, sigma_gradients
from fairseq_rkm.ops.kernel_functions import Terms, slopes_of
from fairseq_rkm.ops.ngram import project
from fairseq_rkm.ops.passes import Saved
from fairseq_rkm.ops.weights import Weights, memory_dtype


class Filters(NamedTuple):
    """What the kernel reads of a candidate's weights, ``(d,)`` each, in the memory's dtype.

    Attributes:
        squares: ``|w|^2``.
        scale: s; 1 for a kernel without.
        offset: b; 0 for a kernel without.
        bias: the candidate's bias; 0 without biases.
    """

    squares: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor


def filters_of(cell: Cell, weights: Weights) -> Filters:
    """What the kernel reads of the weights."""
    size = weights.input.size(0) // len(cell.gates)
    wide = memory_dtype(weights.input.dtype)
    squares = weights.input[:size].to(wide).square().sum(1)
    if _is_fed_back(cell, weights):
        squares = squares + weights.recurrent[:size].to(wide).square().sum(1)  # type: ignore[index]
    scale = torch.ones_like(squares) if weights.kernel_scale is None else weights.kernel_scale.to(wide)
    offset = torch.zeros_like(squares) if weights.kernel_offset is None else weights.kernel_offset.to(wide)
    bias = torch.zeros_like(squares) if weights.bias is None else weights.bias[:size].to(wide)
    return Filters(squares, scale, offset, bias)


def squared_windows(inputs: Tensor, ngram: int) -> Tensor:
    """``|X_t|^2`` of all steps, ``(T, B, 1)``, in the memory's dtype, from extended inputs, ``(T + n - 1, B, m)``."""
    squares = squared(inputs)
    steps = inputs.size(0) - ngram + 1
    total = squares[:steps]
    for start in range(1, ngram):
        total = total + squares[start : start + steps]
    return total


def squared(vectors: Tensor) -> Tensor:
    """Squared lengths, ``(..., 1)``, in the memory's dtype, of ``(..., n)``."""
    return vectors.to(memory_dtype(vectors.dtype)).square().sum(-1, keepdim=True)


def product_bias(cell: Cell, weights: Weights) -> Tensor | None:
    """The biases that the product may add: not the candidate's, which is added behind its kernel."""
    if weights.bias is None:
        return None
    size = weights.bias.size(0) // len(cell.gates)
    return torch.cat([torch.zeros_like(weights.bias[:size]), weights.bias[size:]])


def candidate(cell: Cell, dot: Tensor, filters: Filters, windows: Tensor) -> Tensor:
    """``c~_t`` before a squashing, ``(..., d)``, from ``w^T z``, ``(..., d)``, and ``|z|^2``, ``(..., 1)``."""
    return cell.kernel.value(_terms(dot, filters, windows)) + filters.bias


def take_candidates(cell: Cell, weights: Weights, inputs: Tensor, gates: Tensor) -> None:
    """Take all candidates that do not see ``h_{t-1}`` through the kernel.

    Args:
        cell: the cell.
        weights: its weights.
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        gates: ``(T, B, G * d)``. The candidate's block holds ``w^T z``, and gets ``c~_t`` before a squashing.
    """
    filters = filters_of(cell, weights)
    if pointwise_candidates.takes(gates):
        pointwise_candidates.take(cell.kernel, gates, torch.stack(filters), _windows_read(cell, weights, inputs))
        return
    dots = gates[..., : gates.size(2) // len(cell.gates)]
    windows = squared_windows(inputs, weights.input.size(1) // inputs.size(2))
    dots.copy_(candidate(cell, dots.to(windows.dtype), filters, windows))


def _windows_read(cell: Cell, weights: Weights, inputs: Tensor) -> Tensor | None:
    """``|X_t|^2`` of all steps, ``(T, B, 1)``; None for a kernel that reads none."""
    if not pointwise_candidates.reads_windows(cell.kernel):
        return None
    return squared_windows(inputs, weights.input.size(1) // inputs.size(2))


def sees_hidden(cell: Cell) -> bool:
    """Whether ``h_{t-1}`` is part of the candidate's z."""
    return CANDIDATE in cell.recurrent_gates


def _is_fed_back(cell: Cell, weights: Weights) -> bool:
    return sees_hidden(cell) and weights.recurrent is not None


def _terms(dot: Tensor, filters: Filters, windows: Tensor) -> Terms:
    return Terms(dot, filters.squares, windows, filters.scale, filters.offset)


class CandidateSlopes:
    """The slopes of all steps' candidates, for a backward pass; products and norms are computed anew.

    Args:
        cell: the cell.
        weights: its weights.
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        before: all ``h_{t-1}``, ``(T, B, d)``; read only if the candidate sees them.

    Attributes:
        dot: the slope of ``c~_t`` with respect to ``w^T z``, ``(T, B, d)``.
        windows: with respect to ``|z|^2``, ``(T, B, d)``; None for zero.
    """

    def __init__(self, cell: Cell, weights: Weights, inputs: Tensor, before: Tensor) -> None:
        size = weights.input.size(0) // len(cell.gates)
        wide = memory_dtype(inputs.dtype)
        self.cell, self.weights, self.inputs, self.size = cell, weights, inputs, size
        self.ngram = weights.input.size(1) // inputs.size(2)
        self.before = before if _is_fed_back(cell, weights) else None
        dot = project(inputs, weights.input[:size], None).to(wide)
        windows = squared_windows(inputs, self.ngram)
        if self.before is not None:
            dot = dot + (self.before @ weights.recurrent[:size].t()).to(wide)  # type: ignore[index]
            windows = windows + squared(self.before)
        self._slopes = cell.kernel.slopes(_terms(dot, filters_of(cell, weights), windows))
        self.dot, self.windows = self._slopes.dot, self._slopes.windows

    def parameter_gradients(
        self, hidden: Tensor, memory: Tensor, gates: Tensor, grad_gates: Tensor, grad_candidate: Tensor,
        known: Mapping[str, Tensor | None], needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """As :func:`fairseq_rkm.ops.gradients.parameter_gradients`, which computes the products.

        Args:
            hidden: all ``h_t``, ``(T + 1, B, d)``, the initial one first.
            memory: all ``c_t``, ``(T + 1, B, d)``, the initial one first.
            gates: the activated gates, ``(T, B, G * d)``; the candidate's block holds ``c~_t``.
            grad_gates: the gradients of the pre-activations, ``(T, B, G * d)``; the candidate's are those of ``w^T z``.
            grad_candidate: the gradient of ``c~_t`` before a squashing, ``(T, B, d)``.
            known: as there.
            needs: as there.
        """
        wanted = dict(zip(("inputs", *Weights._fields), needs, strict=True))
        found, slopes = dict(known), self._slopes
        if (wanted["sigma_i"] or wanted["sigma_f"]) and "sigma_i" not in found:
            candidate = gates[..., : self.size].to(memory.dtype)
            found["sigma_i"], found["sigma_f"] = sigma_gradients(
                grad_candidate, candidate, memory[:-1], self.weights.sigma_i
            )
        windows = None
        if slopes.windows is not None and wanted["inputs"]:
            windows = self.through_windows(grad_candidate * slopes.windows)
        totals = Totals(
            grad_candidate.sum((0, 1)) if wanted["bias"] else None,
            self._sum(grad_candidate, slopes.filters),
            windows,
            self._sum(grad_candidate, slopes.scale) if wanted["kernel_scale"] else None,
            self._sum(grad_candidate, slopes.offset) if wanted["kernel_offset"] else None,
        )
        return gradients_with_totals(
            self.cell, self.weights, self.inputs, hidden, memory, gates, grad_gates, totals, found, needs
        )

    def through_windows(self, grad: Tensor) -> Tensor:
        """The gradient of ``|z|^2``, ``(..., 1)``, from one that holds each unit's share, ``(..., d)``."""
        return grad.sum(-1, keepdim=True)

    @staticmethod
    def _sum(grad_candidate: Tensor, slope: Tensor | None) -> Tensor | None:
        return None if slope is None else (grad_candidate * slope).sum((0, 1))


class Totals(NamedTuple):
    """What the candidates of all steps together give to gradients; None is zero.

    Attributes:
        bias: the gradient of the candidate's bias, ``(d,)``.
        filters: of ``|w|^2``, ``(d,)``.
        windows: of each ``|z_t|^2``, ``(T, B, 1)``.
        scale: of s, ``(d,)``.
        offset: of b, ``(d,)``.
    """

    bias: Tensor | None
    filters: Tensor | None
    windows: Tensor | None
    scale: Tensor | None
    offset: Tensor | None


def gradients_with_totals(
    cell: Cell, weights: Weights, inputs: Tensor, hidden: Tensor, memory: Tensor, gates: Tensor, grad_gates: Tensor,
    totals: Totals, known: Mapping[str, Tensor | None], needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.gradients.parameter_gradients`, and what comes through norms and a kernel's parameters.

    The candidate's block of ``grad_gates`` holds the gradient of ``w^T z``.
    """
    wanted = dict(zip(("inputs", *Weights._fields), needs, strict=True))
    size, found = weights.input.size(0) // len(cell.gates), dict(known)
    for name, total in (("kernel_scale", totals.scale), ("kernel_offset", totals.offset)):
        found[name] = memory.new_zeros(size) if total is None and wanted[name] else total
    products = parameter_gradients(cell, weights, inputs, hidden, memory, gates, grad_gates, found, needs)
    grads = dict(zip(wanted, products, strict=True))
    if grads["bias"] is not None and totals.bias is not None:
        grads["bias"][:size] = totals.bias
    if totals.filters is not None:
        twice = 2 * totals.filters.unsqueeze(1)
        _add_norm(grads["input"], weights.input, twice, size)
        if _is_fed_back(cell, weights):
            _add_norm(grads["recurrent"], weights.recurrent, twice, size)
    grad_inputs = grads["inputs"]
    if totals.windows is not None and grad_inputs is not None:
        twice, steps = 2 * totals.windows, totals.windows.size(0)
        for start in range(weights.input.size(1) // inputs.size(2)):
            window = slice(start, start + steps)
            grad_inputs[window] += (twice * inputs[window]).to(grad_inputs.dtype)
    return tuple(grads.values())


def _add_norm(grad: Tensor | None, matrix: Tensor | None, twice: Tensor, size: int) -> None:
    """Add what comes through ``|w|^2`` to the gradient of a matrix of filters."""
    if grad is not None and matrix is not None:
        grad[:size] += (twice * matrix[:size]).to(grad.dtype)


def gradients_of_taken(
    saved: Saved, hidden: Tensor, memory: Tensor, gates: Tensor, grad_gates: Tensor,
    known: Mapping[str, Tensor | None], needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`gradients_with_totals`, for candidates by :func:`take_candidates`, to which no total is known.

    The candidate's block of ``grad_gates`` holds the gradient of ``c~_t`` before a squashing, and gets that of
    ``w^T z``.
    """
    if pointwise_candidates.takes(grad_gates):
        return _gradients_in_one_launch(saved, hidden, memory, gates, grad_gates, known, needs)
    slopes = CandidateSlopes(saved.cell, saved.weights, saved.inputs, hidden[:-1])
    block = grad_gates[..., : memory.size(2)]
    to_candidate = block.to(memory.dtype, copy=True)
    block.copy_(to_candidate * slopes.dot)
    return slopes.parameter_gradients(hidden, memory, gates, grad_gates, to_candidate, known, needs)


def _gradients_in_one_launch(
    saved: Saved, hidden: Tensor, memory: Tensor, gates: Tensor, grad_gates: Tensor,
    known: Mapping[str, Tensor | None], needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As :func:`gradients_of_taken`."""
    cell, weights, inputs, size = saved.cell, saved.weights, saved.inputs, memory.size(2)
    wanted = dict(zip(("inputs", *Weights._fields), needs, strict=True))
    found = dict(known)
    if (wanted["sigma_i"] or wanted["sigma_f"]) and "sigma_i" not in found:
        candidates, grads = (tensor[..., :size].to(memory.dtype) for tensor in (gates, grad_gates))
        found["sigma_i"], found["sigma_f"] = sigma_gradients(grads, candidates, memory[:-1], weights.sigma_i)
    dots, filters = project(inputs, weights.input[:size], None), torch.stack(filters_of(cell, weights))
    windows = _windows_read(cell, weights, inputs)
    sums, through_windows = pointwise_candidates.differentiate(cell.kernel, grad_gates, dots, filters, windows)
    read = slopes_of(cell.kernel)
    totals = Totals(
        sums["bias"] if wanted["bias"] else None,
        sums["filters"] if "filters" in read else None,
        through_windows,
        sums["scale"] if "scale" in read and wanted["kernel_scale"] else None,
        sums["offset"] if "offset" in read and wanted["kernel_offset"] else None,
    )
    return gradients_with_totals(cell, weights, inputs, hidden, memory, gates, grad_gates, totals, found, needs)
