"""On GPUs, without feedback: parallel in time (``scan_kernels.py``).

The gates are one matrix product over all steps. The memory remains: a linear recurrence with known coefficients. A
cell without memory needs none. Layer normalisation makes the recurrence nonlinear: it goes step by step, in one launch.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gate_layout import gate_places
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.kernel_candidates import gradients_of_taken, product_bias, take_candidates
from fairseq_rkm.ops.ngram import is_empty, last_real_step, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.triton_launches import Launcher
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights, memory_dtype
from fairseq_rkm.triton_presence import INTERPRETED, has_triton

BLOCK_T, BLOCK_D, WARPS = 32, 32, 4
MAX_NORMED = 8192
"""The most units of a layer that one program normalises, 16 in a thread."""
LARGEST_CLIP = 1e30
"""The largest bound of a memory: sums over a chunk of its size are finite in float32."""


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """The reason why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda" and not (INTERPRETED and inputs.device.type == "cpu"):
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is not None:
        return "with feedback a step has to wait for the one before"
    if cell.clip is not None and cell.clip > LARGEST_CLIP:
        return f"it clips at {LARGEST_CLIP:g} or below, not at {cell.clip:g}"
    if cell.clip is not None and weights.norm_weight is not None:
        return "it clips no memory that is normalised"
    if weights.norm_weight is not None and not cell.has_memory:
        return "without memory it does not normalise: there is no loop to speed up"
    if weights.norm_weight is not None and weights.norm_weight.numel() > MAX_NORMED:
        return f"it normalises up to {MAX_NORMED} units"
    if is_empty(inputs, weights.input):
        return "it needs at least one step and one sequence"
    return None if has_triton() else "it needs Triton, which is not installed"


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    gates = project(inputs, weights.input, weights.bias if cell.kernel.is_linear else product_bias(cell, weights))
    steps, batch, size = gates.size(0), gates.size(1), gates.size(2) // len(cell.gates)
    if not cell.kernel.is_linear:  # the Triton kernels find the candidates as they find linear ones
        take_candidates(cell, weights, inputs, gates)
    memories = gates.new_empty(steps + 1, batch, size, dtype=memory_dtype(gates.dtype))
    output = gates.new_empty(steps, batch, size)
    moments = None
    last_output, last_memory = gates.new_empty(batch, size), memories.new_empty(batch, size)
    given: tuple[Tensor, ...] = (_or(memory, memories), memories, output, last_output, last_memory)
    if weights.norm_weight is not None and weights.norm_bias is not None:
        moments = memories.new_empty(steps, batch, 2)
        given += (moments, weights.norm_weight, weights.norm_bias)
    _run("forward", cell, weights, keep, gates, given, memories, memory is not None)
    if keep is not None:
        last = last_real_step(keep).view(1, -1, 1).expand(1, batch, size)
        first = output.new_zeros(1, batch, size) if hidden is None else hidden.unsqueeze(0)
        last_output, last_memory = torch.cat([first, output]).gather(0, last)[0], memories.gather(0, last)[0]
    return Results(output, last_output, last_memory, (gates, memories, moments))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, keep, weights, (gates, memories, moments) = saved.cell, saved.keep, saved.weights, saved.own
    steps, batch, size = memories.size(0) - 1, memories.size(1), memories.size(2)
    grad_output = gates.new_zeros(steps, batch, size) if grads[0] is None else grads[0].contiguous()
    grad_hidden, grad_memory = (None if g is None else g.contiguous() for g in grads[1:])
    grad_gates, first_memory = torch.empty_like(gates), memories.new_empty(batch, size)
    last = None if keep is None else last_real_step(keep) - 1
    given: tuple[Tensor, ...] = (
        memories, grad_output, _or(grad_hidden, gates), _or(grad_memory, memories), _or(last, gates), grad_gates,
        first_memory,
    )  # fmt: skip
    shares: dict[str, Tensor] = {}
    if moments is not None and weights.norm_weight is not None:
        shares = {name: torch.empty_like(first_memory) for name in ("norm_weight", "norm_bias")}
        given += (*shares.values(), moments, weights.norm_weight)
    _run("backward", cell, weights, keep, gates, given, memories, grad_hidden is not None, grad_memory is not None)
    need_inputs, need_hidden, need_memory, *need_weights = needs
    first_hidden = gates.new_zeros(batch, size) if need_hidden else None
    if last is not None:
        # A row without a real step passes its initial state on.
        never = (last < 0).unsqueeze(1)
        if grad_memory is not None:
            first_memory = torch.where(never, grad_memory, first_memory)
        if grad_hidden is not None:
            first_hidden = grad_hidden.masked_fill(~never, 0) if need_hidden else None
    # Without feedback no gradient needs the hidden states.
    known = {name: share.sum(0) for name, share in shares.items()}
    wanted = need_inputs, *need_weights
    if cell.kernel.is_linear:
        grad_inputs, *rest = parameter_gradients(
            cell, weights, saved.inputs, memories, memories, gates, grad_gates, known, wanted
        )
    else:
        grad_inputs, *rest = gradients_of_taken(saved, memories, memories, gates, grad_gates, known, wanted)
    return grad_inputs, first_hidden, first_memory if need_memory else None, *rest


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The pre-activations, all c, and the layer norm's means and reciprocal deviations."""
    steps, batch, size, gates, narrow, wide, norm = extent
    return (
        ((steps, batch, gates), narrow), ((steps + 1, batch, size), wide), ((steps, batch, 2), wide) if norm else None
    )  # fmt: skip


PASSES = Passes(forward, backward, own)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument; any tensor serves in place of None, as the kernel is compiled not to read it."""
    return other if tensor is None else tensor


def _run(
    direction: str, cell: Cell, weights: Weights, keep: Tensor | None, gates: Tensor, given: tuple[Tensor, ...],
    memories: Tensor, *flags: bool,
) -> None:  # fmt: skip
    """Launch a kernel over the rows of the batch and blocks of units; one block, if all units are needed at once."""
    steps, batch, size = gates.size(0), memories.size(1), memories.size(2)
    scale_i = memories.new_ones(1) * weights.sigma_i if cell.input_is_constant else None
    scale_f = memories.new_ones(size) * weights.sigma_f if cell.forget_is_constant else None
    real = None if keep is None else keep.contiguous().view(torch.uint8)
    normed = size if weights.norm_weight is not None else 0
    launch = _launcher(direction, cell, keep is not None, memories.dtype, normed, *flags)
    tensors = gates, *given, _or(real, gates), _or(scale_i, memories), _or(scale_f, memories)
    launch((batch, 1 if normed else -(-size // BLOCK_D), 1), gates.device, tensors, steps, batch, size)


@functools.cache
def _launcher(direction: str, cell: Cell, mask: bool, wide: torch.dtype, normed: int, *flags: bool) -> Launcher:
    """The launches of a kernel; ``normed``: d with layer normalisation, else 0; ``flags``: in the order of the next."""
    from fairseq_rkm.ops.backends.scan import scan_kernels

    forward = direction == "forward"
    names = ("HAS_FIRST",) if forward else ("HAS_LAST_HIDDEN", "HAS_LAST_MEMORY")
    constants = {
        "GATES": len(cell.gates), **gate_places(cell), "SQUASH_CANDIDATE": cell.squash_candidate,
        "SQUASH_OUTPUT": cell.squash_output, "MASK": mask,
        "WIDE": scan_kernels.tl.float64 if wide == torch.float64 else scan_kernels.tl.float32,
        **dict(zip(names, flags, strict=True)),
    }  # fmt: skip
    if normed:
        block = 1 << (normed - 1).bit_length()
        constants |= {"BLOCK_D": block, **({"EPSILON": LAYER_NORM_EPS} if forward else {})}
        kernel = scan_kernels.normed_forward if forward else scan_kernels.normed_backward
        return Launcher(kernel, constants, num_warps=min(16, max(1, block // 256)))
    constants |= {"HAS_MEMORY": cell.has_memory, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D, "CLIP": cell.clip}
    constants |= {"FINITE": LARGEST_CLIP} if forward else {}
    kernel = scan_kernels.forward if forward else scan_kernels.backward
    return Launcher(kernel, constants, num_warps=WARPS)
