"""``blockwise`` for both directions of a layer in one launch: :class:`fairseq_rkm.ops.passes.Directions`."""

from collections.abc import Sequence

from torch import Tensor

from fairseq_rkm.ops.backends.blockwise.blockwise import launch_backward, launch_forward
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.passes import Directions
from fairseq_rkm.ops.weights import Weights

Both = tuple[Weights, Weights]


def forward(
    cell: Cell, weights: Both, keep: Tensor | None, gates: Tensor, number: int, first: Sequence[Tensor | None],
    last: Sequence[Tensor], hiddens: Tensor, memories: Tensor, output: Tensor | None,
) -> None:  # fmt: skip
    """The forward pass: one kernel."""
    layers = hiddens.size(0)
    before = [_address(tensor, number, layers) for tensor in first]
    behind = [_address(tensor, number, layers) for tensor in last]
    all_h, all_c = _address(hiddens, number, layers), _address(memories, number, layers)
    launch_forward(cell, weights, keep, gates, before, behind, all_h, all_c, output)


def backward(
    cell: Cell, weights: Both, keep: Tensor | None, gates: Tensor, number: int, memories: Tensor,
    grad_output: Tensor | None, last: Sequence[Tensor | None], first: Tensor, grad_gates: Tensor,
) -> None:  # fmt: skip
    """The backward pass: one kernel."""
    layers = memories.size(0)
    behind = [_address(tensor, number, layers) for tensor in last]
    before = [_address(first, at, 2 * layers) for at in (number, layers + number)]
    all_c = _address(memories, number, layers)
    launch_backward(cell, weights, keep, gates, all_c, grad_output, behind, before, grad_gates)


DIRECTIONS = Directions(forward, backward)


def _address(tensor: Tensor | None, number: int, parts: int) -> int | None:
    """Where a layer's part of a stack's tensor lies."""
    return None if tensor is None else tensor.data_ptr() + number * (tensor.nbytes // parts)
