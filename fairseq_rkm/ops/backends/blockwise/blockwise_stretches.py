"""``blockwise`` over a stretch of time, on a part of the GPU: :class:`fairseq_rkm.ops.stretches.Stretches`."""

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.blockwise.blockwise import LOADED, _room, block_time, launch_backward, launch_forward
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.stretches import Pair, Stretches, Way
from fairseq_rkm.ops.weights import Weights


def forward(
    cell: Cell, weights: Weights, keep: Tensor | None, gates: Tensor, first: Pair, last: tuple[Tensor, Tensor],
    hiddens: Tensor, memories: Tensor, rows: int,
) -> None:  # fmt: skip
    """The forward pass: one kernel."""
    launch_forward(cell, (weights,), keep, gates, first, last, hiddens, memories, rows=rows)


def backward(
    cell: Cell, weights: Weights, keep: Tensor | None, gates: Tensor, memories: Tensor, grad_output: Tensor | None,
    last: Pair, first: tuple[Tensor, Tensor], grad_gates: Tensor, rows: int,
) -> None:  # fmt: skip
    """The backward pass: one kernel."""
    launch_backward(cell, (weights,), keep, gates, memories, grad_output, last, first, grad_gates, rows)


def ways(cell: Cell, size: int, batch: int, device: int) -> list[Way]:
    """Each number of rows with which all blocks of two layers run at the same time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    beside = {rows: processors // -(-batch // rows) for rows in _room(cell, size, device)}
    return [Way(rows, count, block_time(cell, size, rows)) for rows, count in beside.items() if count > 1]


def are_compiled(cell: Cell, size: int, dtype: torch.dtype, rows: int, mask: bool, device: int) -> bool:
    """Whether both kernels have been loaded: a graph that is being recorded cannot load code."""
    return all((direction, cell, size, dtype, rows, mask, device, 1) in LOADED for direction in ("forward", "backward"))


STRETCHES = Stretches(forward, backward, ways, are_compiled)
