"""On GPUs, with feedback, whatever the size: a cuBLAS product and one Triton kernel a step (``step_loop.py``).

For layers that do not fit on the chip, batches for which ``persistent`` is slow, and float32 without TF32. Projections
of the inputs and gradients of the weights are one matrix product each over all steps, as in the other backends.
Candidates through any kernel are taken within the loop, or before it if they do not see ``h_{t-1}``. For a few rows
product and all else are one kernel (``joined_loop.py``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.scan.scan import MAX_NORMED
from fairseq_rkm.ops.backends.stepwise.joined_loop import is_joined, new_loop
from fairseq_rkm.ops.backends.stepwise.step_loop import FEW_STEPS, LOOPS, Kind, StepLoop, on_device, rows_for
from fairseq_rkm.ops.backends.stepwise.step_loop import Sequence as Tensors
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.kernel_candidates import (
    Totals,
    filters_of,
    gradients_of_taken,
    gradients_with_totals,
    product_bias,
    sees_hidden,
    squared,
    squared_windows,
    take_candidates,
)
from fairseq_rkm.ops.kernel_functions import LINEAR, slopes_of
from fairseq_rkm.ops.ngram import is_empty, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.weights import Weights
from fairseq_rkm.triton_presence import INTERPRETED, has_triton


def refuses(_cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """The reason why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda" and not (INTERPRETED and inputs.device.type == "cpu"):
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is None:
        return "without feedback a step need not wait for the one before"
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 and bfloat16, not in {inputs.dtype}"
    if weights.norm_weight is not None and weights.norm_weight.numel() > MAX_NORMED:
        return f"it normalises up to {MAX_NORMED} units"
    if is_empty(inputs, weights.input):
        return "it needs at least one step and one sequence"
    return None if has_triton() else "it needs Triton, which is not installed"


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    gates = project(inputs, weights.input, None)
    steps, batch, size = gates.size(0), gates.size(1), gates.size(2) // len(cell.gates)
    hiddens = gates.new_empty(steps + 1, batch, size)
    memories = gates.new_empty(steps + 1, batch, size, dtype=torch.float32)
    moments = None if weights.norm_weight is None else memories.new_empty(steps, batch, 2)
    for states, first in ((hiddens, hidden), (memories, memory)):
        _ = states[0].zero_() if first is None else states[0].copy_(first)
    real = None if keep is None else keep.contiguous().view(torch.uint8)
    looped, bias = _in_the_loop(cell), weights.bias
    if looped != cell:
        take_candidates(cell, weights, inputs, gates)
        bias = product_bias(cell, weights)
    tensors = Tensors(
        gates, memories, hiddens, real, _aligned(bias), *_scales(cell, weights, memories),
        _aligned(weights.norm_weight), _aligned(weights.norm_bias), moments,
    )  # fmt: skip
    _read_kernel(tensors, looped, weights, inputs)
    with _loop(_kind(looped, weights, keep, tensors), weights, tensors) as loop:
        loop.begin_forward(hiddens[0])
        loop.run(tensors, steps, batch)
    output = hiddens[1:] if keep is None else hiddens[1:].masked_fill(~keep.unsqueeze(-1), 0)
    return Results(output, hiddens[-1].clone(), memories[-1].clone(), (gates, hiddens, memories, moments))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, keep, weights, (gates, hiddens, memories, moments) = saved.cell, saved.keep, saved.weights, saved.own
    steps, batch, size = memories.size(0) - 1, memories.size(1), memories.size(2)
    grad_output, grad_hidden, grad_memory = (None if g is None else g.contiguous() for g in grads)
    grad_gates = torch.empty_like(gates)
    shares = [None if moments is None else torch.zeros_like(memories[0]) for _ in range(2)]
    real = None if keep is None else keep.contiguous().view(torch.uint8)
    tensors = Tensors(
        gates, memories, hiddens, real, None, *_scales(cell, weights, memories), _aligned(weights.norm_weight), None,
        moments, _aligned(grad_output), grad_gates, *shares,
    )  # fmt: skip
    need_inputs, need_hidden, need_memory, *need_weights = needs
    wanted = need_inputs, *need_weights
    looped = _in_the_loop(cell)
    kind = _kind(looped, weights, keep, tensors, () if looped.kernel.is_linear else _totals(cell, wanted))
    if not looped.kernel.is_linear:
        _read_kernel(tensors, cell, weights, saved.inputs, hiddens[:-1])
        tensors.totals = memories.new_zeros(len(kind.totals), batch, size)
        tensors.shares = None if tensors.windows is None else memories.new_empty(steps, batch, kind.parts)
    with _loop(kind, weights, tensors) as loop:
        loop.begin_backward(batch, grad_hidden, grad_memory)
        loop.run(tensors, steps, batch)
        first_hidden = loop.first_hidden_gradient(batch, steps) if need_hidden else None
        first_memory = loop.carry[:batch].clone()
    if tensors.shares is not None and first_hidden is not None:
        first_hidden += 2 * tensors.shares[0].sum(1, keepdim=True) * hiddens[0]
    grad_inputs, *rest = _input_and_weight_gradients(saved, kind, tensors, wanted)
    to_hidden = None if first_hidden is None else first_hidden.to(hiddens.dtype)
    initial = to_hidden, first_memory if need_memory else None
    return grad_inputs, *initial, *rest


def _input_and_weight_gradients(
    saved: Saved, kind: Kind, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs and of the fields of :class:`Weights`, once the loop is done."""
    cell, weights, inputs, (gates, hiddens, memories, _) = saved.cell, saved.weights, saved.inputs, saved.own
    if tensors.grad_gates is None:
        raise TypeError("the tensors of a forward pass")
    states = hiddens, memories, gates, tensors.grad_gates
    shares = {"norm_weight": tensors.grad_gain, "norm_bias": tensors.grad_shift}
    known = {name: None if share is None else share.sum(0) for name, share in shares.items()}
    if cell.kernel.is_linear:
        return parameter_gradients(cell, weights, inputs, *states, known, needs)
    if tensors.totals is None:
        return gradients_of_taken(saved, *states, known, needs)
    summed = dict(zip(kind.totals, tensors.totals.sum(1), strict=True))
    known["sigma_i"] = summed["sigma_i"].sum() if "sigma_i" in summed else None
    known["sigma_f"] = summed.get("sigma_f")
    windows = None if tensors.shares is None else tensors.shares.sum(2, keepdim=True)
    totals = Totals(summed.get("bias"), summed.get("filters"), windows, summed.get("scale"), summed.get("offset"))
    return gradients_with_totals(cell, weights, inputs, *states, totals, known, needs)


def _read_kernel(
    tensors: Tensors, cell: Cell, weights: Weights, inputs: Tensor, before: Tensor | None = None
) -> None:  # fmt: skip
    """Give the loop what it reads of a candidate's kernel; ``before``: all ``h_{t-1}``, for the backward pass."""
    if cell.kernel.is_linear:
        return
    tensors.filters = torch.stack(filters_of(cell, weights))
    if "windows" in slopes_of(cell.kernel):
        squares = squared_windows(inputs, weights.input.size(1) // inputs.size(2))
        tensors.windows = squares if before is None else squares + squared(before)


@cache
def _in_the_loop(cell: Cell) -> Cell:
    """The cell as the loop over the steps has it: candidates that do not see ``h_{t-1}`` go through a kernel before."""
    return cell if cell.kernel.is_linear or sees_hidden(cell) else cell.through(LINEAR)


def _totals(cell: Cell, needs: tuple[bool, ...]) -> tuple[str, ...]:
    """The sums over the steps that the gradients of inputs and weights need."""
    wanted = dict(zip(("inputs", *Weights._fields), needs, strict=True))
    slopes = slopes_of(cell.kernel)
    needed = {
        "bias": wanted["bias"],
        "filters": "filters" in slopes and (wanted["input"] or wanted["recurrent"]),
        "scale": "scale" in slopes and wanted["kernel_scale"],
        "offset": "offset" in slopes and wanted["kernel_offset"],
        "sigma_i": cell.input_is_constant and wanted["sigma_i"],
        "sigma_f": cell.forget_is_constant and wanted["sigma_f"],
    }
    return tuple(name for name, need in needed.items() if need)


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The gates, all h, all c, and the layer norm's means and reciprocal deviations."""
    steps, batch, size, gates, narrow, wide, norm = extent
    return (
        ((steps, batch, gates), narrow), ((steps + 1, batch, size), narrow), ((steps + 1, batch, size), wide),
        ((steps, batch, 2), wide) if norm else None,
    )  # fmt: skip


PASSES = Passes(forward, backward, own)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """A tensor that begins at a multiple of 16 bytes, as kernels take it that all do."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def _scales(cell: Cell, weights: Weights, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``s_i`` and ``s_f`` of a cell that has them constant."""
    scale_i = like.new_ones(1) * weights.sigma_i if cell.input_is_constant else None
    scale_f = like.new_ones(like.size(2)) * weights.sigma_f if cell.forget_is_constant else None
    return scale_i, scale_f


def _kind(
    cell: Cell, weights: Weights, keep: Tensor | None, tensors: Tensors, totals: tuple[str, ...] | None = None
) -> Kind:
    """The kind of loop that a pass needs; ``totals``: those of the backward pass, None forward."""
    batch, size, dtype = tensors.memories.size(1), tensors.memories.size(2), tensors.gates.dtype
    given = (tensors.bias if totals is None else tensors.grad_output) is not None
    tf32 = dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    normed = weights.norm_weight is not None
    joined = is_joined(cell, batch, size, dtype, normed, tf32)
    rows = rows_for(batch, dtype, joined)
    return Kind(
        cell, totals is not None, rows, size, dtype, normed, keep is not None, given, tf32, totals or (), joined
    )  # fmt: skip


@contextmanager
def _loop(kind: Kind, weights: Weights, tensors: Tensors) -> Iterator[StepLoop]:
    """A loop for this thread alone: one that is kept, with graphs; or a new one for a few steps, or within a graph."""
    steps, device, recurrent = tensors.memories.size(0) - 1, tensors.gates.device, weights.recurrent
    if recurrent is None:
        raise TypeError("a problem that was refused")
    with on_device(device):
        graphs = device.type == "cuda" and steps > FEW_STEPS and not torch.cuda.is_current_stream_capturing()
        loop = LOOPS.find(kind, device, new_loop) if graphs else new_loop(kind, device, recurrent)
        with loop.lock:
            if graphs:
                loop.prepare(steps)
            loop.take_weights(recurrent)
            yield loop
