"""``native`` for a few steps without gradients: PyTorch's products, and one call of C a layer."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops.backends.native.native import _missing, compiled_cell, library
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gate_layout import recurrent_slice
from fairseq_rkm.ops.weights import Weights

_TYPES: Any = (*[ctypes.c_int] * 4, *[ctypes.c_void_p] * 3, *[ctypes.c_float] * 2, *[ctypes.c_void_p] * 6)


MOST_NUMBERS = 1 << 20
"""The most numbers of all outputs of several steps: for more, :mod:`.native` has memory in huge pages."""
FEW_ROWS, LARGE_WEIGHTS = 2, 1 << 18
"""Up to so many rows, and from so many weights on, PyTorch's products a step at a time take less time than C's."""
WORK_OF_A_THREAD, POINTWISE_WORK = 1 << 20, 64
"""A thread is worth its start for so many multiplications; a unit's step without products counts for so many."""


def takes(cell: Cell, dtype: torch.dtype, steps: int, batch: int, size: int) -> bool:
    """Whether :func:`run` takes so many steps of a cell with a linear kernel."""
    if dtype is not torch.float32 or (steps > 1 and steps * batch * size > MOST_NUMBERS):
        return False
    return _missing(compiled_cell(cell, _at_once(cell, steps, batch, size), cell.has_feedback)) is None


def _at_once(cell: Cell, steps: int, batch: int, size: int) -> int:
    """The steps that a call of C takes: all, or one, with PyTorch's product before it.

    For a single step, and for a few rows and large weights, it would take longer to pack the weights for C.
    """
    large = size * size * len(cell.recurrent_gates) >= LARGE_WEIGHTS
    return 1 if cell.has_feedback and batch <= FEW_ROWS and large else steps


def run(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fairseq_rkm.ops.few_steps.way_for`."""
    if batch_first and x.size(1) > 1:
        output, *after = run(cell, x.transpose(0, 1).contiguous(), layers, hidden, memory, False)
        return output.transpose(0, 1), after[0], after[1]
    steps, batch = (1, x.size(0)) if batch_first else (x.size(0), x.size(1))
    size = layers[0].input.size(0) // len(cell.gates)
    states = len(layers), batch, size
    last_hidden = x.new_empty(states) if hidden is None else torch.empty_like(hidden)
    last_memory = x.new_empty(states) if memory is None else torch.empty_like(memory)
    h, c, h_after, c_after = _address(hidden), _address(memory), last_hidden.data_ptr(), last_memory.data_ptr()
    at_once, onward = _at_once(cell, steps, batch, size), 4 * batch * size
    function = _function(cell, at_once == 1)
    each = POINTWISE_WORK if at_once == 1 else size * len(cell.recurrent_gates) + POINTWISE_WORK
    threads = min(torch.get_num_threads(), 1 + at_once * batch * size * each // WORK_OF_A_THREAD)
    for number, weights in enumerate(layers):
        matrix, recurrent, bias, gain, shift, scale_i, scale_f, *_ = weights
        gates = F.linear(x.view(steps * batch, x.size(2)), matrix, bias)
        x = x.new_empty((batch, 1, size) if batch_first else (steps, batch, size))
        fed, before = None if hidden is None else hidden[number], c
        for step in range(0, steps, at_once):
            if at_once == 1 and recurrent is not None:
                if fed is not None:
                    rows = gates if steps == 1 else gates[step * batch : (step + 1) * batch]
                    rows = rows if rows.size(1) == recurrent.size(0) else rows[:, recurrent_slice(cell, size)]
                    rows.addmm_(fed, recurrent.t())
                fed = x[step] if steps > 1 else None
            done = function(
                at_once, batch, size, threads, None if at_once == 1 else _address(recurrent), _address(gain),
                _address(shift), scale_i, scale_f, gates.data_ptr() + step * 4 * batch * gates.size(1), h, before,
                x.data_ptr() + step * onward, h_after, c_after,
            )  # fmt: skip
            if not done:
                raise MemoryError(f"no memory for {steps} steps of {batch} sequences and {size} units")
            before = c_after
        h, c, h_after, c_after = h and h + onward, c and c + onward, h_after + onward, c_after + onward
    return x, last_hidden, last_memory


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _function(cell: Cell, alone: bool) -> Any:
    """``recurrence_steps`` of ``native.c``, for a single step or for several."""
    function = library(compiled_cell(cell, 1 if alone else 2, cell.has_feedback)).recurrence_steps
    function.argtypes, function.restype = _TYPES, ctypes.c_int
    return function
