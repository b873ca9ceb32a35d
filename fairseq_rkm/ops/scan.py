"""On GPUs, without feedback: parallel in time (``scan_kernels.py``).

The gates are one matrix product over all steps; what is left is a linear recurrence of the memory with known
coefficients, or nothing at all for a cell without memory.
"""

import functools
import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_rkm.ops.batched import gate_slices, sigma_gradients
from fairseq_rkm.ops.cells import CANDIDATE, FORGET, INPUT, OUTPUT, Cell
from fairseq_rkm.ops.ngram import align, last_real_step, project, project_backward, unalign
from fairseq_rkm.ops.weights import Weights

BLOCK_T, BLOCK_D, WARPS = 32, 32, 4


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """Why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is not None:
        return "with feedback a step has to wait for the one before"
    if weights.norm_weight is not None and cell.has_memory:
        return "with layer normalisation the memory is no linear recurrence"
    if weights.norm_weight is not None:
        return "it does not normalise; without memory the batched backend has no loop either"
    if not inputs.numel() or not inputs.size(1):
        return "it needs at least one step and one sequence"
    return None if _has_triton() else "it needs Triton, which is not installed"


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor, memory: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fairseq_rkm.ops.reference.recurrence`; differentiable once."""
    return _Scan.apply(cell, keep, inputs, hidden, memory, *weights)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, keep: Tensor | None, inputs: Tensor, hidden: Tensor, memory: Tensor, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = Weights(*tensors)
        ctx.input_size = inputs.size(2)
        inputs, matrix = align(inputs, weights.input)
        gates = project(inputs, matrix, weights.bias)
        memories = memory.new_empty(gates.size(0) + 1, *memory.shape)
        memories[0] = memory
        output = hidden.new_empty(gates.size(0), *hidden.shape)
        _run("forward", cell, weights, keep, gates, (gates, memories, output), memories)
        ctx.cell, ctx.numbers = cell, weights.numbers()
        ctx.save_for_backward(keep, inputs, gates, memories, *weights.tensors())
        if keep is None:
            return output, output[-1].clone(), memories[-1].clone()
        last = last_real_step(keep).view(1, -1, 1).expand(1, *hidden.shape)
        final = torch.cat([hidden.unsqueeze(0), output]).gather(0, last)[0]
        return output, final, memories.gather(0, last)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_hidden: Tensor, grad_memory: Tensor) -> tuple[Any, ...]:
        keep, inputs, gates, memories, *tensors = ctx.saved_tensors
        cell, weights = ctx.cell, Weights(*tensors)._replace(**ctx.numbers)
        steps, batch, size = memories.size(0) - 1, memories.size(1), memories.size(2)
        last = torch.full((batch,), steps, device=gates.device) if keep is None else last_real_step(keep)
        grad_gates, first_memory = torch.empty_like(gates), torch.empty_like(memories[0])
        given = (
            gates, memories, grad_output.contiguous(), grad_hidden.contiguous(), grad_memory.contiguous(), last - 1,
            grad_gates, first_memory,
        )  # fmt: skip
        _run("backward", cell, weights, keep, gates, given, memories)
        never = (last == 0).unsqueeze(1)
        first_memory = torch.where(never, grad_memory, first_memory) if keep is not None else first_memory
        first_hidden = grad_hidden * never if keep is not None else torch.zeros_like(grad_hidden)
        needs = dict(zip(Weights._fields, ctx.needs_input_grad[5:], strict=True))
        grads: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)
        _, matrix = align(inputs, weights.input, ctx.input_size)
        grad_inputs, grads["input"] = project_backward(
            grad_gates, inputs, matrix, ctx.needs_input_grad[2], needs["input"]
        )
        grad_inputs = None if grad_inputs is None else grad_inputs[..., : ctx.input_size]
        if grads["input"] is not None:
            grads["input"] = unalign(grads["input"], inputs.size(2), ctx.input_size)
        if needs["bias"]:
            grads["bias"] = grad_gates.sum((0, 1))
        if needs["sigma_i"] or needs["sigma_f"]:
            wide = memories.dtype
            block = gate_slices(cell, size)[CANDIDATE]
            grads["sigma_i"], grads["sigma_f"] = sigma_gradients(
                grad_gates[..., block].to(wide), gates[..., block].to(wide), memories[:-1], weights.sigma_i
            )
        ordered = [grads[name] if needs[name] else None for name in Weights._fields]
        return None, None, grad_inputs, first_hidden, first_memory, *ordered


def _run(
    name: str, cell: Cell, weights: Weights, keep: Tensor | None, gates: Tensor, given: tuple[Tensor, ...],
    memories: Tensor,
) -> None:  # fmt: skip
    """Launch a kernel over the rows of the batch and blocks of units."""
    from fairseq_rkm.ops import scan_kernels

    wide = scan_kernels.tl.float64 if memories.dtype == torch.float64 else scan_kernels.tl.float32
    none = memories  # never read: the kernel is compiled without what would
    scale_i = none if not cell.input_is_constant else memories.new_ones(1) * weights.sigma_i
    scale_f = none if not cell.forget_is_constant else memories.new_ones(memories.size(2)) * weights.sigma_f
    place = {gate.upper(): cell.gates.index(gate) if gate in cell.gates else -1 for gate in (INPUT, FORGET, OUTPUT)}
    flags = keep.contiguous().view(torch.uint8) if keep is not None else none
    grid = (memories.size(1), -(-memories.size(2) // BLOCK_D))
    with torch.cuda.device(gates.device) if gates.is_cuda else nullcontext():
        getattr(scan_kernels, name)[grid](
            *given, flags, scale_i, scale_f, gates.size(0), *memories.shape[1:],
            GATES=len(cell.gates), **place, HAS_MEMORY=cell.has_memory, SQUASH_CANDIDATE=cell.squash_candidate,
            SQUASH_OUTPUT=cell.squash_output, MASK=keep is not None, WIDE=wide, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )  # fmt: skip
