"""Half and mixed precision: gradients are unscaled once, copies take few launches, flags mean what their help says."""

from collections.abc import Callable
from typing import Any

import torch
from fairseq import options, utils
from fairseq.optim import AMPOptimizer, FP16Optimizer

from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    AMPOptimizer,
    "step",
    why="--amp divides gradients by the loss scale twice, since PyTorch's scaler sees two objects for one optimizer",
    until="fairseq unscales gradients once",
)
def step_once_unscaled(_step: Callable) -> Callable:
    """Make ``step`` go through the optimizer whose gradients ``clip_grad_norm`` has unscaled."""

    def step(optimizer: AMPOptimizer) -> None:
        optimizer.scaler.step(optimizer.optimizer)
        optimizer.scaler.update()

    return step


@patch(
    options,
    "parse_args_and_arch",
    why="on a command line --bf16 also asks for a TPU, and fairseq ends where there is none",
    until="fairseq asks for a TPU by --tpu alone",
)
def without_tpu(parse: Any) -> Any:
    """Make ``parse_args_and_arch`` ask for no TPU where ``torch_xla``, fairseq's way to TPUs, is not installed."""

    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        parsed = parse(*args, **kwargs)
        if utils.xm is not None:
            return parsed
        flags = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(flags, "bf16", False):
            flags.tpu = False
        return parsed

    return parse_args_and_arch


@patch(
    utils,
    "clip_grad_norm_",
    why="beside a GPU fairseq takes the norm there, and cannot clip by it gradients that --cpu leaves on the host",
    until="fairseq keeps the norm beside the gradients",
)
def clip_where_gradients_are(clip: Any) -> Any:
    """Make ``clip_grad_norm_`` bring the norm to the gradients' device."""

    def clip_grad_norm_(params: Any, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        params = [params] if torch.is_tensor(params) else list(params)
        gradients = (p.grad for p in params if getattr(p, "grad", None) is not None)
        device = next((gradient.device for gradient in gradients), None)

        def beside_gradients(norm: torch.Tensor) -> torch.Tensor:
            return (norm if aggregate_norm_fn is None else aggregate_norm_fn(norm)).to(device)

        norm: torch.Tensor = clip(params, max_norm, beside_gradients)
        return norm

    return clip_grad_norm_


COPIES = "with --bf16 fairseq copies weights and gradients to and from float32 one by one, three launches each"


def _unless_flat(separately: Callable[[Any], None], at_once: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a method of ``FP16Optimizer``: ``at_once``, or for flat weights fairseq's own ``separately``."""

    def method(optimizer: Any) -> None:
        (separately if optimizer.has_flat_params else at_once)(optimizer)

    return method


@patch(FP16Optimizer, "_sync_fp16_grads_to_fp32", why=COPIES, until="fairseq copies them in one launch")
def gradients_to_float_at_once(separately: Callable[[Any], None]) -> Callable[[Any], None]:
    """Copy all gradients in one launch."""
    return _unless_flat(separately, _gradients_to_float)


@patch(FP16Optimizer, "_sync_fp32_params_to_fp16", why=COPIES, until="fairseq copies them in one launch")
def weights_to_half_at_once(separately: Callable[[Any], None]) -> Callable[[Any], None]:
    """Copy all weights in one launch."""
    return _unless_flat(separately, _weights_to_half)


@patch(FP16Optimizer, "zero_grad", why=COPIES, until="fairseq clears them in one launch")
def clear_gradients_at_once(separately: Callable[[Any], None]) -> Callable[[Any], None]:
    """Clear all gradients in one launch."""
    return _unless_flat(separately, _no_gradients)


@torch.no_grad()
def _gradients_to_float(optimizer: Any) -> None:
    """Do the work of ``_sync_fp16_grads_to_fp32``."""
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
def _weights_to_half(optimizer: Any) -> None:
    """Do the work of ``_sync_fp32_params_to_fp16``."""
    pairs = [(p, p32) for p, p32 in zip(optimizer.fp16_params, optimizer.fp32_params, strict=True) if p.requires_grad]
    torch._foreach_copy_([p for p, _ in pairs], [p32 for _, p32 in pairs])


@torch.no_grad()
def _no_gradients(optimizer: Any) -> None:
    """Do the work of ``zero_grad``. bfloat16 has no loss scale to reset."""
    for p in optimizer.fp16_params:
        p.grad = None
    torch._foreach_zero_([p32.grad for p32 in optimizer.fp32_params if p32.grad is not None])
    optimizer._needs_sync = False
    if optimizer.scaler is not None:
        optimizer._multiply_factor = 1.0 / float(optimizer.scaler.loss_scale)
