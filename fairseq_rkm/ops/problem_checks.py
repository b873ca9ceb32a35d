"""What all backends may rely on: tensors that fit together, contiguous, in the dtypes of the computation."""

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.weights import Weights, memory_dtype


def check(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None,
) -> None:  # fmt: skip
    """Check shapes, dtypes and devices; a wrong shape might be broadcast, or read beyond its end."""
    check_inputs(inputs)
    device, dtype, (length, batch, features) = inputs.device, inputs.dtype, inputs.shape
    gates, ngram = len(cell.gates) * size, max(1, weights.input.size(-1) // features)
    for what, tensor, shape, wanted in (
        ("weights", weights.input, (gates, ngram * features), dtype),
        ("recurrent weights", weights.recurrent, (len(cell.recurrent_gates) * size, size), dtype),
        ("biases", weights.bias, (gates,), dtype),
        ("layer norm's gain", weights.norm_weight, (size,), None),
        ("layer norm's bias", weights.norm_bias, (size,), None),
        ("input's scale sigma_i", _read(weights.sigma_i, cell.input_is_constant), (), None),
        ("memory's scale sigma_f", _read(weights.sigma_f, cell.forget_is_constant), (size,), None),
        ("kernel's scale", weights.kernel_scale, (size,), None),
        ("kernel's offset", weights.kernel_offset, (size,), None),
        ("hidden state", hidden, (batch, size), None),
        ("memory", memory, (batch, size), None),
        ("mask", keep, (length - ngram + 1, batch), torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.device != device:
            raise RKMError(f"the inputs are on {device} but the {what} on {tensor.device}; move them to one device")
        if wanted is not None and tensor.dtype != wanted:
            raise RKMError(f"the inputs are {dtype} but the {what} {tensor.dtype}; convert one, or use torch.autocast")
        if wanted is None and not tensor.is_floating_point():
            raise RKMError(f"the {what} must be floating-point numbers, not {tensor.dtype}")
        if tensor.shape != shape:
            raise RKMError(f"the {what} must be of shape {shape} here, not {tuple(tensor.shape)}")
    if not inputs.is_floating_point():
        raise RKMError(f"the inputs must be floating-point numbers, not {dtype}")


def _read(scale: Tensor | float, is_read: bool) -> Tensor | None:
    """A constant scale, if it is a tensor and the cell reads it."""
    return scale if is_read and isinstance(scale, Tensor) else None


def check_inputs(inputs: Tensor) -> None:
    """Check that inputs have time, batch and features, and of the latter at least one."""
    if inputs.dim() != 3 or not inputs.size(2):
        shape = tuple(inputs.shape)
        raise RKMError(f"the inputs must be of shape (T + n - 1, B, m), with m of at least 1, and not {shape}")


def laid_out(
    inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None
) -> tuple[Tensor, Weights, Tensor | None, Tensor | None]:
    """Inputs, weights and initial state, contiguous; state, layer norm and scales in the dtypes of the computation."""
    wide = memory_dtype(inputs.dtype)
    hidden = None if hidden is None else hidden.to(inputs.dtype).contiguous()
    memory = None if memory is None else memory.to(wide).contiguous()
    return inputs.contiguous(), weights.laid_out(wide), hidden, memory
