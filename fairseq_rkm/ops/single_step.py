"""One step without gradients, with little work for the host: two products, and on GPUs one kernel."""

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops.backends.batched import remembered
from fairseq_rkm.ops.cells import OUTPUT, Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights

SOURCE = Path(__file__).with_suffix(".cu")
BLOCK_THREADS = 128
"""The threads of a block."""


def single_step(
    cell: Cell, x: Tensor, weights: Weights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A step's output, and the hidden state and the memory after it, ``(1, B, d)`` each, in memory of their own.

    Args:
        cell: the cell.
        x: ``(B, m)``, plain, contiguous.
        weights: of n = 1; plain, contiguous, on the device of ``x`` and of its dtype. The scales are numbers.
        hidden: ``(1, B, d)``, contiguous, of the dtype of ``x``.
        memory: ``(1, B, d)``, contiguous, of the memory's dtype.
    """
    _, batch, size = memory.shape
    fused = x.is_cuda and weights.norm_weight is None and x.dtype != torch.float64 and nvrtc.available() is None
    # The kernel adds the bias: for a single row cuBLAS would need another launch.
    gates = F.linear(x, weights.input, None if fused else weights.bias)
    if weights.recurrent is not None:
        whole = len(cell.recurrent_gates) == len(cell.gates)
        fed = gates if whole else gates[:, recurrent_slice(cell, size)]
        fed.addmm_(hidden[0], weights.recurrent.t())
    if not fused:
        return _by_operators(cell, gates.to(memory.dtype), weights, hidden, memory)
    output, after, kept = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(memory)
    count = batch * size
    kernel = _kernel(cell, x.dtype, weights.sigma_i, weights.sigma_f, x.device.index)
    given = gates, weights.bias, memory, output, after, kept
    kernel.launch(-(-count // BLOCK_THREADS), BLOCK_THREADS, *given, size, count)
    return output, after, kept


def _by_operators(
    cell: Cell, gates: Tensor, weights: Weights, hidden: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`single_step`, from the pre-activations, which it overwrites."""
    size = memory.size(2)
    if cell.squash_candidate:
        gates[:, :size].tanh_()
    if len(cell.gates) > 1:
        gates[:, size:].sigmoid_()
    after, gates = torch.empty_like(memory), gates.unsqueeze(0)
    remembered(cell, weights, gates, memory, after)
    if cell.clip is not None:
        after.clamp_(-cell.clip, cell.clip)
    if weights.norm_weight is not None:
        after = F.layer_norm(after, (size,), weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)
    output = after.tanh() if cell.squash_output else after
    if cell.output_is_gate:
        output = output * gates[..., gate_slices(cell, size)[OUTPUT]]
    output = output.to(hidden.dtype)
    return output, output.clone(), after


@functools.cache
def _kernel(
    cell: Cell, dtype: torch.dtype, sigma_i: Tensor | float, sigma_f: Tensor | float, device: int
) -> nvrtc.Kernel:
    """The compiled kernel of ``single_step.cu``."""
    macros = (
        *cell_macros(cell).items(),
        ("ELEMENT", dtype.itemsize),
        ("BF16", int(dtype == torch.bfloat16)),
        ("SCALE_I", f"{float(sigma_i)!r}f"),
        ("SCALE_F", f"{float(sigma_f)!r}f"),
    )
    return nvrtc.compile_kernel(SOURCE, "single_step", macros, 0, device, cooperative=False)
