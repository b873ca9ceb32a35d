"""The gradients of inputs and parameters from the gates' gradients: one matrix product each, over all steps.

A backend's own backward pass computes the gradients of the pre-activations. All backends share the rest.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fairseq_rkm.ops.alignment import align, unalign_rows
from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.ngram import project_backward
from fairseq_rkm.ops.weights import Weights

_OTHERS = Weights._fields[3:]
"""The fields of :class:`Weights` whose gradients are no products."""
_NONE_ELSE = (None,) * len(_OTHERS)
_SIGMA_I, _SIGMA_F = _OTHERS.index("sigma_i"), _OTHERS.index("sigma_f")


def parameter_gradients(
    cell: Cell, weights: Weights, inputs: Tensor, hidden: Tensor, memory: Tensor, gates: Tensor,
    grad_gates: Tensor, known: Mapping[str, Tensor | None], needs: tuple[bool, ...],
    operands: list[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the inputs and of the weights, in the order of :class:`Weights`, by one product each.

    Args:
        cell: the cell.
        weights: the weights.
        inputs: extended inputs.
        hidden: all ``h_t``, ``(T + 1, B, d)``, the initial one first.
        memory: all ``c_t``, ``(T + 1, B, d)``, the initial one first.
        gates: the activated gates, ``(T, B, G * d)``.
        grad_gates: the gradients of the pre-activations, ``(T, B, G * d)``.
        known: gradients that the loop over time computed, by field: the layer norm's, and perhaps the scales'.
        needs: True for each result that is wanted; the others are None.
        operands: the aligned :func:`product_operands`, or None to align them here.
    """
    need_inputs, need_matrix, need_recurrent, need_bias = needs[:4]
    size, features, width = hidden.size(2), inputs.size(2), grad_gates.size(2)
    narrow = grad_gates if grad_gates.dtype is inputs.dtype else grad_gates.to(inputs.dtype)
    aligned, matrix, *fed = operands or align(*product_operands(weights, inputs, hidden, need_recurrent))
    rows = narrow.view(-1, width)
    grad_inputs, grad_matrix = project_backward(rows, aligned, matrix, need_inputs, need_matrix)
    grad_recurrent = None
    if fed and need_recurrent:
        whole = len(cell.recurrent_gates) == len(cell.gates)
        fed_back = rows if whole else rows[:, recurrent_slice(cell, size)]
        grad_recurrent = torch.mm(fed_back.t(), fed[0].view(-1, fed[0].size(2)))
    columns = aligned.size(2)
    if columns != features or (grad_recurrent is not None and grad_recurrent.size(1) != size):
        by_taps = None if grad_matrix is None else grad_matrix.unflatten(1, (-1, columns))
        grad_inputs, by_taps, grad_recurrent = cut_columns(
            (grad_inputs, features), (by_taps, features), (grad_recurrent, size)
        )
        grad_matrix = None if by_taps is None else by_taps.flatten(1)
    grad_bias = None
    if need_bias:
        total = grad_gates.view(-1, width).sum(0)
        grad_bias = total if total.dtype is inputs.dtype else total.to(inputs.dtype)
    need_others = needs[4:]
    if not any(need_others):
        return grad_inputs, grad_matrix, grad_recurrent, grad_bias, *_NONE_ELSE
    others = {**dict.fromkeys(_OTHERS), **known}
    read = (need_others[_SIGMA_I] and cell.input_is_constant) or (need_others[_SIGMA_F] and cell.forget_is_constant)
    if read and "sigma_i" not in known:
        block = gate_slices(cell, size)[CANDIDATE]
        to_i, to_f = sigma_gradients(
            grad_gates[..., block].to(memory.dtype), gates[..., block].to(memory.dtype), memory[:-1], weights.sigma_i
        )
        others["sigma_i"] = to_i if cell.input_is_constant else None
        others["sigma_f"] = to_f if cell.forget_is_constant else None
    rest = (others[name] if need else None for name, need in zip(_OTHERS, need_others, strict=True))
    return grad_inputs, grad_matrix, grad_recurrent, grad_bias, *rest


def cut_columns(*padded: tuple[Tensor | None, int]) -> list[Tensor | None]:
    """Gradients without the columns that aligned their operands; None stays."""
    cut = iter(unalign_rows([(grad, size) for grad, size in padded if grad is not None]))
    return [None if grad is None else next(cut) for grad, _ in padded]


def product_operands(weights: Weights, inputs: Tensor, hidden: Tensor, need_recurrent: bool) -> list[Tensor]:
    """The inputs, their weight and, for the gradient of ``U``, all ``h_{t-1}``; none is aligned yet."""
    fed = [hidden[:-1]] if weights.recurrent is not None and need_recurrent else []
    return [inputs, weights.input, *fed]


def sigma_gradients(
    grad_candidate: Tensor, candidate: Tensor, previous: Tensor, sigma_i: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Gradients of the constant scales ``s_i`` and ``s_f``.

    The candidate's gradient is ``s_i > 0`` times the gradient of ``c_t`` before the layer norm.

    Args:
        grad_candidate: the gradient of ``c~_t``, ``(T, B, d)``.
        candidate: ``c~_t``, ``(T, B, d)``.
        previous: ``c_{t-1}``, ``(T, B, d)``.
        sigma_i: ``s_i``.
    """
    grad_memory = grad_candidate / sigma_i
    return (grad_memory * candidate).sum(), (grad_memory * previous).sum((0, 1))
