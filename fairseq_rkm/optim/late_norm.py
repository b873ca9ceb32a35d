"""The norm of the gradients, an update late, so that the host need not wait for the GPU.

fairseq's trainer asks at each update, before it takes the step, whether the norm is finite. The answer is known when
the GPU has finished, which then stands still while the host prepares the step, the log and the next update. Here the
trainer sees the norm of the update before, which has arrived by then; that is also what it logs. An update whose own
norm is not finite changes no weights, which the optimizer decides on the GPU, and the trainer ends as it always does,
an update later. The first update is waited for.
"""

from collections.abc import Callable
from typing import Any, Optional

from torch import Tensor

from fairseq_rkm.late_values import LateValues
from fairseq_rkm.optim.averaging import AveragingOptimizer


def late(clip_grad_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Trainer.clip_grad_norm``, an update late where nothing but the trainer's question depends on it."""

    def clipped(trainer: Any, clip_norm: float) -> Tensor:
        norm = clip_grad_norm(trainer, clip_norm)
        optimizer = _decides_alone(trainer)
        if optimizer is None or not _is_on_gpu(norm):
            return norm
        optimizer.skip_unless_finite(norm)
        if not hasattr(trainer, "late_norm"):
            trainer.late_norm = LateValues()
        shown: Tensor = trainer.late_norm.exchange(norm)
        return shown

    return clipped


def _decides_alone(trainer: Any) -> Optional[AveragingOptimizer]:
    """The optimizer, unless loss scaling, which the norm governs, or other processes, which compare theirs, need it."""
    if getattr(trainer.optimizer, "scaler", None) is not None or trainer.data_parallel_world_size > 1:
        return None
    return AveragingOptimizer.of(trainer)


def _is_on_gpu(norm: Tensor) -> bool:
    return norm.is_cuda
