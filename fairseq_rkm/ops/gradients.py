"""The gradients of inputs and parameters from the gates' gradients: one matrix product each, over all steps.

A backend's own backward pass computes the gradients of the pre-activations. All backends share the rest.
"""

from collections.abc import Mapping

from torch import Tensor

from fairseq_rkm.ops.alignment import align, unalign_rows
from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.ngram import project_backward
from fairseq_rkm.ops.weights import Weights


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
    size, narrow = hidden.size(2), grad_gates.to(inputs.dtype)
    wanted = dict(zip(("inputs", *Weights._fields), needs, strict=True))
    grads: dict[str, Tensor | None] = {**dict.fromkeys(wanted), **known}
    operands = operands or align(*product_operands(weights, inputs, hidden, wanted["recurrent"]))
    aligned, matrix, *fed = operands
    grad_inputs, grad_matrix = project_backward(narrow, aligned, matrix, wanted["inputs"], wanted["input"])
    padded: dict[str, tuple[Tensor, int]] = {}
    if grad_inputs is not None:
        padded["inputs"] = grad_inputs, inputs.size(2)
    if grad_matrix is not None:
        padded["input"] = grad_matrix.unflatten(1, (-1, aligned.size(2))), inputs.size(2)
    for before in fed:
        fed_back = narrow[..., recurrent_slice(cell, size)].flatten(0, 1)
        padded["recurrent"] = fed_back.t() @ before.flatten(0, 1), size
    for name, grad in zip(padded, unalign_rows(list(padded.values())), strict=True):
        grads[name] = grad.flatten(1) if name == "input" else grad
    if wanted["bias"]:
        grads["bias"] = grad_gates.sum((0, 1)).to(inputs.dtype)
    if (wanted["sigma_i"] or wanted["sigma_f"]) and "sigma_i" not in known:
        block = gate_slices(cell, size)[CANDIDATE]
        grads["sigma_i"], grads["sigma_f"] = sigma_gradients(
            grad_gates[..., block].to(memory.dtype), gates[..., block].to(memory.dtype), memory[:-1], weights.sigma_i
        )
    return tuple(grads[name] if wanted[name] else None for name in wanted)


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
