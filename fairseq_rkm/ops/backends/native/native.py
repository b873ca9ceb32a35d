"""On CPUs, in float32: ``native.c``, compiled once by the machine's own C compiler.

PyTorch computes the products over all steps (projections, gradients of the weights), and C the loop over time. Without
a compiler the backend refuses and says so once; ``"auto"`` then takes :mod:`fairseq_rkm.ops.backends.batched`.
"""

import ctypes
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation.c_compiler import compile_library
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.gate_layout import recurrent_slice
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.ngram import is_empty, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.weights import Weights

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")

_POINTERS = (
    "weights", "gain", "shift", "scale_f", "scale_i", "keep", "gates", "hidden", "memory", "moments", "grad_output",
    "grad_hidden", "grad_memory", "grad_gates", "to_memory", "grad_gain", "grad_shift", "sums", "packed",
)  # fmt: skip


class _Problem(ctypes.Structure):
    """``Problem`` of ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("steps", "batch", "size", "norm")),
        *((name, ctypes.c_float if name == "scale_i" else ctypes.c_void_p) for name in _POINTERS),
        ("threads", ctypes.c_int),
    )


@functools.cache
def library(cell: Cell) -> ctypes.CDLL:
    """The compiled recurrence of a cell, from the user's cache or compiled now.

    Raises:
        OSError: it cannot be compiled here, or the result has no place.
    """
    return compile_library(f"native-{cell.name}", SOURCE, cell_macros(cell))


@functools.cache
def _missing(cell: Cell) -> str | None:
    """The reason why a cell cannot be compiled here, printed once for all cells; None if it can."""
    try:
        library(cell)
    except OSError as error:
        _say(str(error))
        return str(error)
    return None


@functools.cache
def _say(reason: str) -> None:
    logger.warning(f"CPU recurrences run in plain PyTorch, at about half the speed: {reason}")


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """The reason why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cpu":
        return f"it runs on CPUs, and the inputs are on {inputs.device}"
    if inputs.dtype != torch.float32:
        return f"it computes in float32, not in {inputs.dtype}"
    if is_empty(inputs, weights.input):
        return "it needs at least one step and one sequence"
    steps = inputs.size(0) - weights.input.size(1) // inputs.size(2) + 1
    return _missing(compiled_cell(cell, steps, weights.recurrent is not None))


def compiled_cell(cell: Cell, steps: int, feedback: bool) -> Cell:
    """The cell to call in C; a single step calls it without feedback: PyTorch computes the product."""
    return cell.without_feedback() if steps == 1 and feedback else cell


HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14


def _buffer(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor, in huge pages if it is large enough.

    Memory of this size is new at each call. Page faults of 4 kB each would take a tenth of a pass's time.
    """
    tensor = like.new_empty(shape)
    if tensor.nbytes < 4 * HUGE_PAGE:
        return tensor
    first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - first) // HUGE_PAGE * HUGE_PAGE
    if length >= 4 * HUGE_PAGE and sys.platform == "linux":
        # The system may ignore this advice; pages are then small.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return tensor


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    width, ngram = weights.input.size(0), weights.input.size(1) // inputs.size(2)
    steps, batch, size = inputs.size(0) - ngram + 1, inputs.size(1), width // len(cell.gates)
    if ngram == 1 and steps * batch * width * inputs.element_size() < 4 * HUGE_PAGE:
        gates = F.linear(inputs, weights.input, weights.bias)
    else:
        gates = project(inputs, weights.input, weights.bias, _buffer(inputs, steps * batch, width))
    hiddens, memories = (_buffer(inputs, steps + 1, batch, size) for _ in range(2))
    for states, first in ((hiddens, hidden), (memories, memory)):
        _ = states[0].zero_() if first is None else states[0].copy_(first)
    moments = gates.new_empty(steps, batch, 2) if weights.norm_weight is not None else None
    call = {"gates": gates, "hidden": hiddens, "memory": memories, "moments": moments}
    _run("forward", cell, weights, keep, call)
    output = hiddens[1:]
    output = output if keep is None else output.masked_fill(~keep.unsqueeze(-1), 0)
    return Results(output, hiddens[-1].clone(), memories[-1].clone(), (gates, hiddens, memories, moments))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, weights, (gates, hiddens, memories, moments) = saved.cell, saved.weights, saved.own
    grad_gates, row = _buffer(gates, *gates.shape), memories[0]
    # Each row's share of the gradients of the layer norm's gain and bias.
    norm = None if moments is None else (torch.zeros_like(row), torch.zeros_like(row))
    grad_output = torch.zeros_like(hiddens[1:]) if grads[0] is None else grads[0].contiguous()
    # C writes the initial state's gradients in place of the final one's.
    grad_hidden, grad_memory = (
        torch.zeros_like(row) if grad is None else grad.clone(memory_format=torch.contiguous_format)
        for grad in grads[1:]
    )
    call = {
        "gates": gates, "hidden": hiddens, "memory": memories, "moments": moments, "grad_output": grad_output,
        "grad_hidden": grad_hidden, "grad_memory": grad_memory, "grad_gates": grad_gates,
        "to_memory": None if norm is None else torch.empty_like(row),
        "grad_gain": None if norm is None else norm[0], "grad_shift": None if norm is None else norm[1],
    }  # fmt: skip
    _run("backward", cell, weights, saved.keep, call)
    known = {} if norm is None else {"norm_weight": norm[0].sum(0), "norm_bias": norm[1].sum(0)}
    grad_inputs, *rest = parameter_gradients(
        cell, weights, saved.inputs, hiddens, memories, gates, grad_gates, known, (needs[0], *needs[3:])
    )
    return grad_inputs, grad_hidden if needs[1] else None, grad_memory if needs[2] else None, *rest


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The gates, all h, all c, and the layer norm's means and reciprocal deviations."""
    steps, batch, size, gates, _, wide, norm = extent
    states = (steps + 1, batch, size), wide
    return ((steps, batch, gates), wide), states, states, ((steps, batch, 2), wide) if norm else None


PASSES = Passes(forward, backward, own)


def _run(direction: str, cell: Cell, weights: Weights, keep: Tensor | None, call: dict[str, Any]) -> None:
    """Call into C. PyTorch computes a single step's product: packing the weights for C would cost more."""
    gates, hidden, recurrent = call["gates"], call["hidden"], weights.recurrent
    steps, batch, size = gates.size(0), gates.size(1), hidden.size(2)
    if steps == 1 and recurrent is not None:
        block = recurrent_slice(cell, size)
        if direction == "forward":
            gates[0, :, block].addmm_(hidden[0], recurrent.t())
        _run(direction, cell.without_feedback(), weights._replace(recurrent=None), keep, call)
        if direction == "backward":
            call["grad_hidden"].addmm_(call["grad_gates"][0, :, block], recurrent)
        return
    recurrent = None if recurrent is None else recurrent.contiguous()
    packed = gates.new_empty(-(-size // 16) * 16 * recurrent.size(0)) if recurrent is not None else None
    scale_f = gates.new_ones(size) * weights.sigma_f if cell.forget_is_constant else None
    tensors = {
        "weights": recurrent, "gain": weights.norm_weight, "shift": weights.norm_bias, "scale_f": scale_f,
        "keep": None if keep is None else keep.contiguous().view(torch.uint8), "packed": packed,
        "sums": None if weights.norm_weight is None else gates.new_empty(batch, 2), **call,
    }  # fmt: skip
    problem = _Problem(
        steps=steps, batch=batch, size=size, norm=int(weights.norm_weight is not None),
        scale_i=float(weights.sigma_i) if cell.input_is_constant else 0.0, threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )  # fmt: skip
    compiled = library(cell)
    function = compiled.recurrence_forward if direction == "forward" else compiled.recurrence_backward
    function(ctypes.byref(problem))
