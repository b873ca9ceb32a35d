"""The host reads some numbers of training one update late, so that it does not wait for the GPU.

The norm of the gradients. fairseq's trainer asks at each update, before the step, whether the norm is finite. The
answer is known only when the GPU has finished. The GPU then stands still while the host prepares the step, the log and
the next update. Here the trainer sees and logs the norm of the update before, which has arrived by then. If an update's
own norm is not finite, the optimizer decides on the GPU to change no weights. The trainer then ends as it always does,
one update later. The host waits for the first update only.

The log. fairseq's metrics add up the logged tensors on the GPU, in some hundred launches, and read averages from it.
Here the numbers of an update go to the host in one copy while the GPU works on. They are logged with the next update. A
run's log thus lags by one update. The first update is waited for and counts twice. The last update of a run is not
logged.
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
    """A tensor on its way from the GPU to the host."""

    def __init__(self) -> None:
        self._sent: Optional[tuple[Tensor, Optional[torch.cuda.Event]]] = None

    def exchange(self, values: Tensor) -> Tensor:
        """Send values to the host, and return the values that were sent before.

        Args:
            values: of any shape and dtype, on any device.

        Returns:
            The values of the last call, on the host. The first call waits for its own values and returns them.
        """
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
    """Take the logging outputs of one update, one dictionary a process, and return the outputs of the update before."""

    def __init__(self) -> None:
        self._values = LateValues()
        self._before: Optional[Outputs] = None

    def exchange(self, outputs: Outputs) -> Outputs:
        """Return the last update's outputs, with their tensors as numbers.

        Args:
            outputs: one dictionary a process. They are returned as they are if they hold no tensor, a tensor on the
                CPU, or one of more than one element.
        """
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
    """Make ``Trainer.clip_grad_norm`` return the last update's norm, where only the trainer's check depends on it."""

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
    """Make ``Trainer._reduce_and_log_stats`` log the last update's numbers in training with an optimizer of ours."""

    def logged(trainer: Any, logging_outputs: Outputs, sample_size: float, grad_norm: Any = None) -> dict:
        # Validation has no gradients.
        if grad_norm is not None and _own_optimizer(trainer) is not None:
            logging_outputs = _readings(trainer).log.exchange(logging_outputs)
        return reduce_and_log(trainer, logging_outputs, sample_size, grad_norm)

    return logged


def _decides_alone(trainer: Any) -> Optional[AveragingOptimizer]:
    """Return the optimizer; None if others need the norm at once, for a loss scale or to compare processes."""
    if getattr(trainer.optimizer, "scaler", None) is not None or trainer.data_parallel_world_size > 1:
        return None
    return _own_optimizer(trainer)


def _own_optimizer(trainer: Any) -> Optional[AveragingOptimizer]:
    """Return the trainer's optimizer, out of fairseq's wrapper of half precision; None if it is not one of ours."""
    optimizer = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    return optimizer if isinstance(optimizer, AveragingOptimizer) else None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
