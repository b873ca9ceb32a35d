"""What the criterion logs, an update late, so that the host need not wait for the GPU.

At each update of training fairseq's metrics add the logged tensors up on the GPU, some hundred launches, and read
averages from it, for which the host waits until all that it has asked for is done. Here the numbers of an update go to
the host in one copy while the GPU works on, and are logged with the next update. So a run's log lags by one update; the
first is waited for, and counts twice, and the last of a run is not logged.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch

from fairseq_rkm.late_values import LateValues
from fairseq_rkm.optim.averaging import AveragingOptimizer

Outputs = list[dict[str, Any]]


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


def late(reduce_and_log: Callable[..., dict]) -> Callable[..., dict]:
    """``Trainer._reduce_and_log_stats``, in training with one of our optimizers with what the last update logged."""

    def logged(trainer: Any, logging_outputs: Outputs, sample_size: float, grad_norm: Any = None) -> dict:
        # Validation has no gradients.
        if grad_norm is not None and AveragingOptimizer.of(trainer) is not None:
            if not hasattr(trainer, "late_log"):
                trainer.late_log = LateLog()
            logging_outputs = trainer.late_log.exchange(logging_outputs)
        return reduce_and_log(trainer, logging_outputs, sample_size, grad_norm)

    return logged


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda
