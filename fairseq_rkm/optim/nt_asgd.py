"""``nt_asgd``: SGD that begins to average its weights when validation stops improving (Merity et al. 2018)."""

import logging
from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.optim.averaging import AveragedWeights, AveragingOptimizer

logger = logging.getLogger(__name__)


@dataclass
class NonMonotoneASGDConfig(FairseqDataclass):
    """Flags of ``--optimizer nt_asgd``."""

    non_monotone_window: int = field(
        default=5, metadata={"help": "validations within which the loss must have reached a new minimum"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "L2 penalty, added to the gradient"})
    lr: List[float] = II("optimization.lr")
    task_name: Optional[str] = II("task._name")


class NonMonotoneASGD(AveragedWeights, torch.optim.SGD):
    """SGD with a non-monotonically triggered average: the mean of all weights since the trigger.

    Args:
        params: the weights.
        window: n of :meth:`record`.
        arguments: as ``torch.optim.SGD``'s.
    """

    def __init__(self, params: list[Tensor], window: int, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self.window = window
        self.param_groups[0]["validation_losses"] = []

    def record(self, loss: float) -> None:
        """Take note of a validation loss, and begin to average if losses no longer improve.

        Averaging begins if the loss is above the least of the earlier losses, the last n of these left out (Merity et
        al. 2018, algorithm 1).
        """
        losses = self.param_groups[0]["validation_losses"]
        if not self.param_groups[0]["averaging"] and len(losses) > self.window and loss > min(losses[: -self.window]):
            self.start_averaging()
            logger.info(
                f"nt_asgd: validation loss {loss:.4f} is above {min(losses[: -self.window]):.4f}, reached at least "
                f"{self.window} validations ago: weights are averaged from update {self.param_groups[0]['updates']} on"
            )
        losses.append(loss)


@register_optimizer("nt_asgd", dataclass=NonMonotoneASGDConfig)
class FairseqNonMonotoneASGD(AveragingOptimizer):
    """NT-ASGD, the optimizer of AWD-LSTM (Merity et al. 2018).

    Every validation counts. Validation once an epoch, fairseq's default, is the published recipe. PyTorch's own fused
    SGD does the updates.

        fairseq-train ... --task stateful_language_modeling --optimizer nt_asgd --lr 30 --clip-norm 0.25

    Raises:
        RKMError: the window is below 1; or an error of :class:`~fairseq_rkm.optim.averaging.AveragingOptimizer`.
    """

    def __init__(self, cfg: NonMonotoneASGDConfig, params: list[Tensor]) -> None:
        super().__init__(cfg)
        if cfg.non_monotone_window < 1:
            raise RKMError(f"--non-monotone-window must be at least 1, not {cfg.non_monotone_window}")
        self._optimizer = NonMonotoneASGD(params, cfg.non_monotone_window, fused=True, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Settings that a resumed run takes from its own flags."""
        return {"lr": self.learning_rate, "weight_decay": self.cfg.weight_decay}
