"""Optimizers that keep an average of the weights, to be validated and saved in place of the weights themselves.

Polyak averaging in the form that ``nt_asgd`` and ``adamw_average`` share. Whatever must survive a checkpoint is in
PyTorch's optimizer, whose state every wrapper of fairseq's (mixed precision, half precision) saves.
:class:`fairseq_rkm.tasks.averaged_validation.AveragedValidation` is the task's part: it puts the average into the model
before a validation and takes it out before the next update.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer
from fairseq.tasks import TASK_REGISTRY
from torch import Tensor

from fairseq_rkm.errors import RKMError


class AveragedWeights(torch.optim.Optimizer):
    """The averaging part of a PyTorch optimizer, to be inherited from before the optimizer itself.

    After the k-th averaged update ``average += max(1 / k, 1 - decay) * (weights - average)``: the mean of the iterates
    as long as they are fewer than ``1 / (1 - decay)``, from there on their exponential average.

    In ``param_groups[0]`` it keeps ``updates``, ``averaged_updates``, ``averaging`` (whether it has begun) and
    ``average_is_in`` (whether the model holds the average, and ``state[p]["average"]`` the weights).

    Args:
        params: as the optimizer's.
        decay: within [0, 1]; 1 gives the plain mean.
        average_after: averaging begins after this many updates; None waits for :meth:`start_averaging`.
        arguments: the optimizer's own.
    """

    supports_flat_params = True
    found_inf: Tensor | None = None
    """On the weights' device; where it is 1, a fused optimizer's step changes no weights."""

    def __init__(
        self, params: Iterable[Tensor], decay: float = 1.0, average_after: int | None = None, **arguments: Any
    ) -> None:
        super().__init__(params, **arguments)
        # PyTorch's fused optimizers offer to skip overflown updates themselves: the average would not know.
        self._step_supports_amp_scaling = False
        self.decay, self.average_after = decay, average_after
        self.param_groups[0].update(updates=0, averaged_updates=0, averaging=False, average_is_in=False)

    def start_averaging(self) -> None:
        """Average all updates from the next one on."""
        self.param_groups[0]["averaging"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights and, once averaging has begun, the average."""
        progress = self.param_groups[0]
        if self.average_after is not None and progress["updates"] >= self.average_after:
            self.start_averaging()
        progress["updates"] += 1
        if not progress["averaging"]:
            return super().step(closure)
        # A weight's average joins once the weight moves, beside the state that the optimizer itself begins then.
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
        """Put the average into the model, or the weights back; whether anything changed."""
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
        """The weights that have an average, and their averages."""
        weights = [p for p in self._weights() if "average" in self.state[p]]
        return weights, [self.state[p]["average"] for p in weights]


def put_average(optimizer: FairseqOptimizer, average_in: bool) -> None:
    """Exchange weights and average of whatever fairseq's optimizer wraps; nothing for optimizers without an average."""
    inner = optimizer.optimizer
    # With half-precision models fairseq optimizes a float32 copy, from which the model is written anew.
    if isinstance(inner, AveragedWeights) and inner.exchange(average_in) and hasattr(optimizer, "fp32_params"):
        optimizer._sync_fp32_params_to_fp16()


class AveragingOptimizer(FairseqOptimizer):
    """What fairseq's side of the averaging optimizers shares.

    Args:
        cfg: the flags.
        averages: whether there can be an average.

    Raises:
        RKMError: a task that would never put the average into the model, or a learning rate or weight decay below 0.
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
        """``--lr``, of which fairseq takes one for each epoch."""
        lr = self.cfg.lr
        return float(lr[0] if isinstance(lr, Sequence) else lr)

    def skip_unless_finite(self, norm: Tensor) -> None:
        """Let the next step change no weights if the gradients' norm is not finite, which only their device knows."""
        self._optimizer.found_inf = norm.isfinite().logical_not_().float()

    def clip_grad_norm(self, max_norm: float, aggregate_norm_fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """fairseq's, in a few launches of kernels in place of two for each weight."""
        if aggregate_norm_fn is not None:  # the weights are sharded
            return super().clip_grad_norm(max_norm, aggregate_norm_fn)
        weights = [p for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights])
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return norm
