"""The cell ``lstm`` as ONNX's own operator, which runtimes compute faster than a loop."""

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import CANDIDATE, FORGET, INPUT, OUTPUT, Cell
from fairseq_rkm.ops.gate_layout import gate_slices
from fairseq_rkm.ops.weights import Weights

ORDER_OF_ONNX = INPUT, OUTPUT, FORGET, CANDIDATE
ORDER_OF_TORCH = INPUT, FORGET, CANDIDATE, OUTPUT


def fits(cell: Cell, window: Tensor, weights: Weights) -> bool:
    """Whether ONNX's LSTM computes this cell on these inputs; onnxruntime has it for float32 alone."""
    same = cell.name == "lstm" and cell.has_feedback and cell.clip is None and weights.norm_weight is None
    same = same and cell.kernel.is_linear
    known = torch.jit.is_tracing() or hasattr(torch.onnx, "ops")  # from PyTorch 2.8
    return same and known and window.dtype == torch.float32


def recurrence(
    cell: Cell, window: Tensor, weights: Weights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Record the operator.

    Args:
        cell: the cell ``lstm``.
        window: ``X_t`` of all steps, ``(T, B, n * m)``.
        weights: the weights.
        hidden: ``h_0``, ``(B, d)``.
        memory: ``c_0``, ``(B, d)``.

    Returns:
        The output, ``(T, B, d)``, and the final hidden state and memory, ``(B, d)`` each.
    """
    record = _by_the_older_exporter if torch.jit.is_tracing() else _by_the_newer_exporter
    output, hidden, memory = record(cell, window, weights, hidden.unsqueeze(0), memory.unsqueeze(0))
    return output, hidden.squeeze(0), memory.squeeze(0)


def _by_the_older_exporter(
    cell: Cell, window: Tensor, weights: Weights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The exporter knows PyTorch's LSTM; it has two biases."""
    matrices = [_restacked(cell, tensor, ORDER_OF_TORCH) for tensor in _matrices(weights)]
    biases = []
    if weights.bias is not None:
        bias = _restacked(cell, weights.bias, ORDER_OF_TORCH)
        biases = [bias, torch.zeros_like(bias)]
    return torch.lstm(window, (hidden, memory), [*matrices, *biases], bool(biases), 1, 0.0, False, False, False)


def _by_the_newer_exporter(
    cell: Cell, window: Tensor, weights: Weights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The exporter would take PyTorch's LSTM apart: here it is given ONNX's by name."""
    matrices = [_restacked(cell, tensor, ORDER_OF_ONNX).unsqueeze(0) for tensor in _matrices(weights)]
    bias = None
    if weights.bias is not None:
        bias = _restacked(cell, weights.bias, ORDER_OF_ONNX).unsqueeze(0)
        bias = torch.cat([bias, torch.zeros_like(bias)], dim=1)
    state = hidden.shape
    output, hidden, memory = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (window, *matrices, bias, None, hidden, memory),
        {"hidden_size": state[2]},
        dtypes=[window.dtype] * 3,
        shapes=[(window.size(0), *state), state, state],
    )
    return output.squeeze(1), hidden, memory


def _matrices(weights: Weights) -> list[Tensor]:
    return [matrix for matrix in (weights.input, weights.recurrent) if matrix is not None]


def _restacked(cell: Cell, stacked: Tensor, order: tuple[str, ...]) -> Tensor:
    """The rows of all gates in another order."""
    places = gate_slices(cell, stacked.size(0) // len(cell.gates))
    return torch.cat([stacked[places[gate]] for gate in order])
