"""``blockwise`` for both directions of a layer in one launch: :class:`fairseq_rkm.ops.passes.Directions`."""

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.blockwise.blockwise import launch_backward, launch_forward
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.passes import Directions, Gradients
from fairseq_rkm.ops.weights import Weights

Both = tuple[Weights, Weights]


def forward(
    cell: Cell, weights: Both, keep: Tensor | None, gates: Tensor, hidden: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, ...]:
    """The forward pass: one kernel."""
    steps, batch, width = gates.shape
    size = width // (2 * len(cell.gates))
    output, hiddens = gates.new_empty((steps, batch, 2 * size)), gates.new_empty((steps + 2, batch, 2 * size))
    memories = gates.new_empty((steps + 2, batch, 2 * size), dtype=torch.float32)
    last = gates.new_empty((2, batch, size)), memories.new_empty((2, batch, size))
    launch_forward(cell, weights, keep, gates, (hidden, memory), last, hiddens, memories, output)
    return output, *last, hiddens, memories


def backward(
    cell: Cell, weights: Both, keep: Tensor | None, gates: Tensor, memories: Tensor, grads: Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass: one kernel."""
    grad_output, *grad_last = grads
    grad_output = None if grad_output is None else grad_output.contiguous()
    last = [None if grad is None else grad.float().contiguous() for grad in grad_last]
    size = memories.size(2) // 2
    first = memories.new_empty((2, 2, gates.size(1), size))
    grad_gates = torch.empty_like(gates)
    first_hidden, first_memory = first
    launch_backward(cell, weights, keep, gates, memories, grad_output, last, (first_hidden, first_memory), grad_gates)
    return grad_gates, first_hidden, first_memory


DIRECTIONS = Directions(forward, backward)
