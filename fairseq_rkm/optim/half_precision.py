"""fairseq's copies between half-precision weights and the float32 ones that it optimizes, all weights at once.

fairseq makes them one by one where the float32 weights are not one flat tensor, as with ``--bf16``: three launches a
weight and update, of which the host pays each.
"""

from collections.abc import Callable
from typing import Any

import torch


def at_once(copy: Callable[[Any], None], separately: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method of ``FP16Optimizer`` that is ``copy``, and fairseq's ``separately`` for flat weights."""

    def method(optimizer: Any) -> None:
        (separately if optimizer.has_flat_params else copy)(optimizer)

    return method


@torch.no_grad()
def gradients_to_float(optimizer: Any) -> None:
    """``_sync_fp16_grads_to_fp32``."""
    if not optimizer._needs_sync:
        return
    pairs = [(p, p32) for p, p32 in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True) if p.requires_grad]
    for p, p32 in pairs:
        if p.grad is None or p32.grad is None:
            p32.grad = torch.zeros_like(p32)
    moved = [(p.grad, p32.grad) for p, p32 in pairs if p.grad is not None]
    if moved:
        given, wanted = map(list, zip(*moved, strict=True))
        torch._foreach_copy_(wanted, given)
    optimizer._needs_sync = False


@torch.no_grad()
def weights_to_half(optimizer: Any) -> None:
    """``_sync_fp32_params_to_fp16``."""
    pairs = [(p, p32) for p, p32 in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True) if p.requires_grad]
    torch._foreach_copy_([p for p, _ in pairs], [p32 for _, p32 in pairs])


@torch.no_grad()
def no_gradients(optimizer: Any) -> None:
    """``zero_grad``, whose loss scale bfloat16 does without."""
    for p in optimizer.fp16_params:
        p.grad = None
    torch._foreach_zero_([p32.grad for p32 in optimizer.fp32_params if p32.grad is not None])
    optimizer._needs_sync = False
    if optimizer.scaler is not None:
        optimizer._multiply_factor = 1.0 / float(optimizer.scaler.loss_scale)
