"""Optimizers that keep an average of the weights. It is validated and saved in place of the weights.

``nt_asgd`` and ``adamw_average`` share this form of Polyak averaging. All state that a checkpoint needs is in PyTorch's
optimizer: every wrapper of fairseq (mixed precision, half precision) saves that. The task's part is
:class:`fairseq_rkm.tasks.averaged_validation.AveragedValidation`. It puts the average into the model before a
validation, and takes it out before the next update.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor

from fairseq_rkm.errors import RKMError


class AveragedWeights(torch.optim.Optimizer):
    """The averaging part of a PyTorch optimizer. A class inherits from it before the optimizer itself.

        class AveragedAdamW(AveragedWeights, torch.optim.AdamW): ...

    After the k-th averaged update ``average += max(1 / k, 1 - decay) * (weights - average)``. This is the mean of the
    weights for the first ``1 / (1 - decay)`` updates, and their exponential average from there on.

    ``param_groups[0]`` holds ``updates``, ``averaged_updates``, ``averaging`` (whether it has begun) and
    ``average_is_in``. While ``average_is_in``, the model holds the average, and ``state[p]["average"]`` the weights.

    Args:
        params: as the optimizer's.
        decay: within [0, 1]; 1 gives the plain mean.
        average_after: averaging begins after this many updates; None waits for :meth:`start_averaging`.
        arguments: the optimizer's own.
    """

    supports_flat_params = True
    found_inf: Tensor | None = None
    """A scalar on the weights' device. Where it is 1, a fused optimizer's step changes no weights."""

    def __init__(
        self, params: Iterable[Tensor], decay: float = 1.0, average_after: int | None = None, **arguments: Any
    ) -> None:
        super().__init__(params, **arguments)
        # PyTorch's fused optimizers offer to skip overflown updates. The average would not know.
        self._step_supports_amp_scaling = False
        self.decay, self.average_after = decay, average_after
        self.param_groups[0].update(updates=0, averaged_updates=0, averaging=False, average_is_in=False)

    def start_averaging(self) -> None:
        """Average all updates from the next one on."""
        self.param_groups[0]["averaging"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights and, once averaging has begun, the average. Arguments and result are PyTorch's."""
        progress = self.param_groups[0]
        if self.average_after is not None and progress["updates"] >= self.average_after:
            self.start_averaging()
        progress["updates"] += 1
        if not progress["averaging"]:
            return super().step(closure)
        # A weight gets its average at its first gradient, when the optimizer begins its own state for it.
        joining = [
            (p, p.detach().clone()) for p in self._weights() if p.grad is not None and "average" not in self.state[p]
        ]
        loss: float | None = super().step(closure)
        for p, before in joining:
            self.state[p]["average"] = before
        progress["averaged_updates"] += 1
        weights, averages = self._averaged()
        if weights:
            torch._foreach_lerp_(averages, weights, max(1 / progress["averaged_updates"], 1 - self.decay))
        return loss

    @torch.no_grad()
    def exchange(self, average_in: bool) -> bool:
        """Put the average into the model, or the weights back. Return whether anything changed."""
        progress = self.param_groups[0]
        if progress["average_is_in"] == average_in or not progress["averaged_updates"]:
            return False
        weights, averages = self._averaged()
        held = [tensor.clone() for tensor in weights]
        torch._foreach_copy_(weights, averages)
        torch._foreach_copy_(averages, held)
        progress["average_is_in"] = average_in
        return True

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the weights that have an average, and their averages."""
        weights = [p for p in self._weights() if "average" in self.state[p]]
        return weights, [self.state[p]["average"] for p in weights]


def put_average(optimizer: FairseqOptimizer, average_in: bool) -> None:
    """Exchange weights and average in the innermost optimizer. Do nothing for optimizers without an average.

    Args:
        optimizer: fairseq's, or a wrapper of it for half precision.
        average_in: whether the model is to hold the average.
    """
    inner = optimizer.optimizer
    # fairseq optimizes a float32 copy of a half-precision model: the model is written anew from it.
    if isinstance(inner, AveragedWeights) and inner.exchange(average_in) and hasattr(optimizer, "fp32_params"):
        optimizer._sync_fp32_params_to_fp16()


class AveragingOptimizer(FairseqOptimizer):
    """The part for fairseq that all averaging optimizers share.

    Args:
        cfg: the flags.
        averages: whether there can be an average.

    Raises:
        RKMError: the task would never put the average into the model, or a learning rate or weight decay is below 0.
    """

    def __init__(self, cfg: Any, averages: bool = True) -> None:
        super().__init__(cfg)
        task = TASK_REGISTRY.get(cfg.task_name)
        if averages and cfg.task_name and not getattr(task, "validates_average", False):
            raise RKMError(
                f"--task {cfg.task_name} does not validate the average of the weights that this optimizer keeps: use "
                "--task stateful_language_modeling, or let your task inherit from "
                "fairseq_rkm.tasks.averaged_validation.AveragedValidation"
            )
        for flag, value in (("--lr", self.learning_rate), ("--weight-decay", cfg.weight_decay)):
            if value < 0:
                raise RKMError(f"{flag} must be 0 or more, not {value}")

    @property
    def learning_rate(self) -> float:
        """The first of ``--lr``: fairseq takes one for each epoch."""
        lr = self.cfg.lr
        return float(lr[0] if isinstance(lr, Sequence) else lr)

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Let the next step change no weights if the gradients' norm is not finite, without waiting for the norm.

        Args:
            norm: a scalar on the gradients' device.
        """
        self._optimizer.found_inf = norm.isfinite().logical_not_().float()

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Clip the gradients as fairseq does, in a few launches of kernels in place of two for each weight.

        Args:
            max_norm: the largest norm; 0 clips nothing.
            aggregate_norm_fn: given if the weights are sharded; fairseq's own method then does the work.

        Returns:
            The gradients' norm before clipping, a scalar on their device.
        """
        if aggregate_norm_fn is not None:  # the weights are sharded
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        weights = [p for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return norm
