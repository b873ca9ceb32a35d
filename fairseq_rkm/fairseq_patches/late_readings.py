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

Several processes decide alike. Each sees the norms of all, and the sums over all of what is logged. These sums stay on
the GPU, as does the number of tokens by which an update is divided.
"""

from collections.abc import Callable
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_rkm.fairseq_patches.registry import patch
from fairseq_rkm.optim.averaging import AveragedWeights, AveragingOptimizer

Outputs = list[dict[str, Any]]
UNTIL = "fairseq's trainer does not wait for the GPU at each update"
ALIKE = 1e-6
"""Norms of several processes may differ by this share, as in the trainer."""
OF_UPDATES = ("sample_size", "ooms", "train_time")
"""The numbers that the trainer sums over processes beside an update's logging output. A validation has one."""


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
        numbers = iter(self._values.exchange(torch.stack([t.detach().flatten()[0].double() for t in tensors])).tolist())
        skeleton = [{key: None if torch.is_tensor(v) else v for key, v in output.items()} for output in outputs]
        before, self._before = self._before or skeleton, skeleton
        return [{key: next(numbers) if v is None else v for key, v in output.items()} for output in before]


class LateReadings:
    """A trainer's norms and log on their way from the GPU.

    Attributes:
        compared: the norms of all processes that arrived last, on the host; None once the trainer has compared them.
        example: an update's logging output, for the shapes of one that a process lacks.
    """

    def __init__(self) -> None:
        self.norm, self.log = LateValues(), LateLog()
        self.compared: Optional[Tensor] = None
        self.example: Optional[dict[str, Any]] = None


class SumOnGPU:
    """A sum over processes by which the trainer divides. It counts as true: to ask would be to wait for it."""

    def __init__(self, total: Tensor) -> None:
        self.total = total

    def __bool__(self) -> bool:
        return True

    def __rtruediv__(self, number: float) -> Tensor:
        # The trainer divides by 1 in place of 0. The optimizers' launches for all weights want float32.
        return (number / self.total.masked_fill(self.total == 0, 1)).float()


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
        readings, norms = _readings(trainer), _norms_of_all(trainer, norm)
        optimizer.skip_unless_finite(norm if len(norms) == 1 else _finite_if_alike(norms))
        readings.compared = arrived = readings.norm.exchange(norms)
        shown = arrived[_rank(trainer)] if arrived.isfinite().all() else arrived.new_tensor(float("nan"))
        return shown.to(norm.dtype)

    return clipped


def _norms_of_all(trainer: Any, norm: Tensor) -> Tensor:
    """Return the norms of all processes on the GPU, one for each rank."""
    if trainer.data_parallel_world_size == 1:
        return norm.reshape(1)
    norms = torch.zeros(trainer.data_parallel_world_size, dtype=torch.float64, device=norm.device)
    norms[_rank(trainer)] = norm
    distributed_utils.all_reduce(norms, group=trainer.data_parallel_process_group)
    return norms


def _finite_if_alike(norms: Tensor) -> Tensor:
    """Return a number on the GPU that is finite if all norms are, and are alike, as the trainer compares them."""
    least, most = norms.aminmax()
    return torch.where(most - least <= ALIKE * (least + ALIKE), most, torch.nan)


def _rank(trainer: Any) -> int:
    return int(trainer.data_parallel_rank) if trainer.data_parallel_world_size > 1 else 0


@patch(
    Trainer,
    "_check_grad_norms",
    why="at each update the host waits to compare the processes' norms; and norms that are not finite in all of them "
    "are reported as norms that differ",
    until=UNTIL,
)
def compare_norms_late(check: Callable[..., None]) -> Callable[..., None]:
    """Make ``Trainer._check_grad_norms`` compare norms where they have arrived, and tell divergence from difference."""

    def checked(trainer: Any, grad_norm: Tensor) -> None:
        readings = _readings(trainer)
        norms, readings.compared = readings.compared, None
        # The trainer itself ends a run for a norm that is not finite. All processes have the same norms here.
        if norms is not None and (not norms.isfinite().all() or _finite_if_alike(norms).isfinite()):
            return
        try:
            check(trainer, grad_norm)
        except FloatingPointError:
            if not trainer._grad_norm_buf.isfinite().all():
                raise FloatingPointError("gradients are Nan/Inf") from None
            raise

    return checked


@patch(
    Trainer,
    "_aggregate_logging_outputs",
    why="in several processes the host waits at each update for sums on the GPU; and a process that ran out of memory "
    "sums other numbers than the rest",
    until=UNTIL,
)
def sum_without_waiting(aggregate: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``Trainer._aggregate_logging_outputs`` sum an update's numbers in one call, and leave them on the GPU."""

    def aggregated(trainer: Any, outputs: Outputs, *further: Any, ignore: bool = False) -> Any:
        if len(further) != len(OF_UPDATES) or not _summable(trainer):
            return aggregate(trainer, outputs, *further, ignore=ignore)
        readings = _readings(trainer)
        if outputs:
            readings.example = outputs[0]
        elif readings.example is None:
            raise MemoryError("the first batch does not fit")
        else:
            outputs, ignore = [readings.example], True
        if _decides_alone(trainer) is None or not _is_on_gpu(torch.empty(0, device=trainer.device)):
            return aggregate(trainer, outputs, *further, ignore=ignore)
        sums = {key: 0 if ignore else sum(o[key] for o in outputs if key in o) for key in outputs[0]}
        totals = _sum_over_processes([*further, *sums.values()], trainer)
        if totals is None:
            return aggregate(trainer, outputs, *further, ignore=ignore)
        size, *others = totals[: len(further)]
        return [dict(zip(sums, totals[len(further) :], strict=True))], (SumOnGPU(size), *others)

    return aggregated


def _summable(trainer: Any) -> bool:
    """Return whether the criterion's logging outputs may be summed over processes, so that none needs the others'."""
    return bool(type(trainer.task).logging_outputs_can_be_summed(trainer.get_criterion()))


def _sum_over_processes(values: list[Any], trainer: Any) -> Optional[tuple[Tensor, ...]]:
    """Return the sums of numbers and of tensors of one element, float64 on the trainer's device.

    Returns:
        None if a tensor has more elements.
    """
    device = trainer.device
    tensors = {i: value for i, value in enumerate(values) if torch.is_tensor(value)}
    if any(value.numel() != 1 for value in tensors.values()):
        return None
    given = [0.0 if i in tensors else float(value) for i, value in enumerate(values)]
    host = torch.tensor(given, dtype=torch.float64, pin_memory=device.type == "cuda")
    parts = list(host.to(device, non_blocking=True).split(1))
    for i, value in tensors.items():
        parts[i] = value.detach().reshape(1).to(device, torch.float64)
    sums = torch.cat(parts)
    distributed_utils.all_reduce(sums, group=trainer.data_parallel_process_group)
    return sums.unbind()


@patch(Trainer, "_reduce_and_log_stats", why="at each update the host waits for the GPU's logged numbers", until=UNTIL)
def log_an_update_late(reduce_and_log: Callable[..., dict]) -> Callable[..., dict]:
    """Make ``Trainer._reduce_and_log_stats`` log the last update's numbers in training with an optimizer of ours."""

    def logged(trainer: Any, logging_outputs: Outputs, sample_size: Any, grad_norm: Any = None) -> dict:
        # Validation has no gradients.
        if grad_norm is not None and _own_optimizer(trainer) is not None:
            logging_outputs = _readings(trainer).log.exchange(logging_outputs)
        size = sample_size.total if isinstance(sample_size, SumOnGPU) else sample_size
        return reduce_and_log(trainer, logging_outputs, size, grad_norm)

    return logged


def _decides_alone(trainer: Any) -> Optional[AveragingOptimizer]:
    """Return the optimizer; None if others need the norm at once, for a loss scale or for weights in parts."""
    optimizer = _own_optimizer(trainer)
    if optimizer is None or getattr(trainer.optimizer, "scaler", None) is not None:
        return None
    return optimizer if isinstance(optimizer.optimizer, AveragedWeights) else None


def _own_optimizer(trainer: Any) -> Optional[AveragingOptimizer]:
    """Return the trainer's optimizer, out of fairseq's wrapper of half precision; None if it is not one of ours."""
    optimizer = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    return optimizer if isinstance(optimizer, AveragingOptimizer) else None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
