"""Numbers of training that the host reads an update late, so that it need not wait for the GPU that computes them.

The norm of the gradients: fairseq's trainer asks at each update, before it takes the step, whether the norm is finite.
The answer is known when the GPU has finished, which then stands still while the host prepares the step, the log and the
next update. Here the trainer sees the norm of the update before, which has arrived by then, and logs it. An update
whose own norm is not finite changes no weights, which the optimizer decides on the GPU, and the trainer ends as it
always does, an update later. The first update is waited for.

The log: fairseq's metrics add the logged tensors up on the GPU, some hundred launches, and read averages from it. Here
the numbers of an update go to the host in one copy while the GPU works on, and are logged with the next update. So a
run's log lags by one update; the first is waited for, and counts twice, and the last of a run is not logged.
"""

from collections.abc import Callable
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_rkm.fairseq_patches.registry import patch
from fairseq_rkm.optim.averaging import AveragingOptimizer

Outputs = list[dict[str, Any]]
UNTIL = "fairseq's trainer does not wait for the GPU at each update"


class LateValues:
    """A tensor on its way from the GPU."""

    def __init__(self) -> None:
        self._sent: Optional[tuple[Tensor, Optional[torch.cuda.Event]]] = None

    def exchange(self, values: Tensor) -> Tensor:
        """Send values to the host; return, on the host, those sent before, or for want of any the same ones."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event() if values.is_cuda else None
        if event is not None:
            event.record()
        before, self._sent = self._sent or (host, event), (host, event)
        arrived, event = before
        if event is not None:
            event.synchronize()
        return arrived


class LateLog:
    """Logging outputs of one update, one dictionary a process, for those of the update before."""

    def __init__(self) -> None:
        self._values = LateValues()
        self._before: Optional[Outputs] = None

    def exchange(self, outputs: Outputs) -> Outputs:
        """The last update's, with its tensors as numbers; without tensors on a GPU, or with larger ones, these."""
        tensors = [value for output in outputs for value in output.values() if torch.is_tensor(value)]
        if not tensors or any(not _is_on_gpu(tensor) or tensor.numel() != 1 for tensor in tensors):
            return outputs
        numbers = iter(self._values.exchange(torch.stack([t.detach().flatten()[0].float() for t in tensors])).tolist())
        skeleton = [{key: None if torch.is_tensor(v) else v for key, v in output.items()} for output in outputs]
        before, self._before = self._before or skeleton, skeleton
        return [{key: next(numbers) if v is None else v for key, v in output.items()} for output in before]


class LateReadings:
    """A trainer's norm and log on their way from the GPU."""

    def __init__(self) -> None:
        self.norm, self.log = LateValues(), LateLog()


_of_trainers: "WeakKeyDictionary[Trainer, LateReadings]" = WeakKeyDictionary()


def _readings(trainer: Any) -> LateReadings:
    return _of_trainers.setdefault(trainer, LateReadings())


@patch(Trainer, "clip_grad_norm", why="at each update the host waits for the GPU's norm of the gradients", until=UNTIL)
def norm_an_update_late(clip_grad_norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Trainer.clip_grad_norm``, an update late where nothing but the trainer's question depends on it."""

    def clipped(trainer: Any, clip_norm: float) -> Tensor:
        norm = clip_grad_norm(trainer, clip_norm)
        optimizer = _decides_alone(trainer)
        if optimizer is None or not _is_on_gpu(norm):
            return norm
        optimizer.skip_unless_finite(norm)
        return _readings(trainer).norm.exchange(norm)

    return clipped


@patch(Trainer, "_reduce_and_log_stats", why="at each update the host waits for the GPU's logged numbers", until=UNTIL)
def log_an_update_late(reduce_and_log: Callable[..., dict]) -> Callable[..., dict]:
    """``Trainer._reduce_and_log_stats``; in training with an optimizer of ours it logs the last update's numbers."""

    def logged(trainer: Any, logging_outputs: Outputs, sample_size: float, grad_norm: Any = None) -> dict:
        # Validation has no gradients.
        if grad_norm is not None and _own_optimizer(trainer) is not None:
            logging_outputs = _readings(trainer).log.exchange(logging_outputs)
        return reduce_and_log(trainer, logging_outputs, sample_size, grad_norm)

    return logged


def _decides_alone(trainer: Any) -> Optional[AveragingOptimizer]:
    """The optimizer, unless loss scaling, which the norm governs, or other processes, which compare theirs, need it."""
    if getattr(trainer.optimizer, "scaler", None) is not None or trainer.data_parallel_world_size > 1:
        return None
    return _own_optimizer(trainer)


def _own_optimizer(trainer: Any) -> Optional[AveragingOptimizer]:
    """The trainer's optimizer, out of fairseq's wrapper of half precision; None if it is none of ours."""
    optimizer = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    return optimizer if isinstance(optimizer, AveragingOptimizer) else None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
