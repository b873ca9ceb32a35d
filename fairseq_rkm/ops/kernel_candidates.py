"""Candidates through a kernel other than the linear one, and their gradients: what all backends share.

The product ``w^T z`` is the linear candidate without its bias. Norms, the kernel and the bias follow pointwise.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gradients import parameter_gradients, sigma_gradients
from fairseq_rkm.ops.kernel_functions import Terms
from fairseq_rkm.ops.ngram import project
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
        size, found = self.size, dict(known)
        if (wanted["sigma_i"] or wanted["sigma_f"]) and "sigma_i" not in found:
            candidate = gates[..., :size].to(memory.dtype)
            found["sigma_i"], found["sigma_f"] = sigma_gradients(
                grad_candidate, candidate, memory[:-1], self.weights.sigma_i
            )
        for name, slope in (("kernel_scale", self._slopes.scale), ("kernel_offset", self._slopes.offset)):
            found[name] = self._sum(grad_candidate, slope) if wanted[name] else None
        grads = dict(
            zip(
                wanted,
                parameter_gradients(
                    self.cell, self.weights, self.inputs, hidden, memory, gates, grad_gates, found, needs
                ),
                strict=True,
            )
        )
        if grads["bias"] is not None:
            grads["bias"][:size] = grad_candidate.sum((0, 1))
        self._add_norms(grads, grad_candidate)
        return tuple(grads.values())

    def through_windows(self, grad: Tensor) -> Tensor:
        """The gradient of ``|z|^2``, ``(..., 1)``, from one that holds each unit's share, ``(..., d)``."""
        return grad.sum(-1, keepdim=True)

    def _sum(self, grad_candidate: Tensor, slope: Tensor | None) -> Tensor:
        return grad_candidate.new_zeros(self.size) if slope is None else (grad_candidate * slope).sum((0, 1))

    def _add_norms(self, grads: dict[str, Tensor | None], grad_candidate: Tensor) -> None:
        """Add what comes through ``|w|^2`` and ``|X_t|^2``."""
        size, weights = self.size, self.weights
        if self._slopes.filters is not None:
            twice = 2 * self._sum(grad_candidate, self._slopes.filters).unsqueeze(1)
            for name, matrix in (("input", weights.input), ("recurrent", weights.recurrent)):
                grad = grads[name]
                if grad is not None and (name == "input" or self.before is not None):
                    grad[:size] += (twice * matrix[:size]).to(grad.dtype)  # type: ignore[index]
        grad_inputs = grads["inputs"]
        if self.windows is not None and grad_inputs is not None:
            twice = 2 * self.through_windows(grad_candidate * self.windows)
            steps = twice.size(0)
            for start in range(self.ngram):
                window = slice(start, start + steps)
                grad_inputs[window] += (twice * self.inputs[window]).to(grad_inputs.dtype)
