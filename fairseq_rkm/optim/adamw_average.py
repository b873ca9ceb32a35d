"""``adamw_average``: AdamW whose weights are averaged over the last part of training."""

from dataclasses import dataclass, field
from typing import Any, List, Optional

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import register_optimizer
from omegaconf import II
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.optim.averaging import AveragedWeights, AveragingOptimizer


@dataclass
class AveragedAdamWConfig(FairseqDataclass):
    """Flags of ``--optimizer adamw_average``."""

    adam_betas: Any = field(default=(0.9, 0.999), metadata={"help": "decay rates of the gradient's two moments"})
    adam_eps: float = field(default=1e-8, metadata={"help": "added to the second moment's root"})
    weight_decay: float = field(default=0.0, metadata={"help": "decoupled weight decay, a share of the learning rate"})
    average_last: float = field(
        default=0.0, metadata={"help": "share of --max-update, at its end, over which weights are averaged; 0: none"}
    )
    average_decay: float = field(default=0.999, metadata={"help": "decay of the average at each update"})
    lr: List[float] = II("optimization.lr")
    max_update: int = II("optimization.max_update")
    task_name: Optional[str] = II("task._name")


class AveragedAdamW(AveragedWeights, torch.optim.AdamW):
    """``torch.optim.AdamW`` with an average of the weights."""


@register_optimizer("adamw_average", dataclass=AveragedAdamWConfig)
class FairseqAveragedAdamW(AveragingOptimizer):
    """AdamW (Loshchilov and Hutter 2019), and an exponential average of its weights to validate and save.

    fairseq's ``adam`` computes the same updates. Without NVIDIA's apex it does so in a Python loop of about ten kernel
    launches for each weight tensor: milliseconds for a language model of a dozen tensors. Here the updates take one
    fused launch, and the average takes another. fairseq's ``--store-ema`` keeps an average as well, but neither
    validation nor fairseq-eval-lm uses it. With ``--average-last 0``, the default, this is plain AdamW, for any task.

        fairseq-train ... --optimizer adamw_average --average-last 0.3 --max-update 10000

    Raises:
        RKMError: a flag is outside its range, or ``--average-last`` is given without ``--max-update``; or an error of
            :class:`~fairseq_rkm.optim.averaging.AveragingOptimizer`.
    """

    def __init__(self, cfg: AveragedAdamWConfig, params: list[Tensor]) -> None:
        super().__init__(cfg, averages=cfg.average_last != 0)
        self.betas = parse_betas(cfg.adam_betas)
        if cfg.adam_eps <= 0:
            raise RKMError(f"--adam-eps must be above 0, not {cfg.adam_eps}")
        for flag, value in (("--average-last", cfg.average_last), ("--average-decay", cfg.average_decay)):
            if not 0 <= value <= 1:
                raise RKMError(f"{flag} must lie within [0, 1], not be {value}")
        if cfg.average_last and cfg.max_update <= 0:
            raise RKMError("--average-last is a share of --max-update, which is not given")
        self._optimizer = AveragedAdamW(
            params,
            decay=cfg.average_decay,
            average_after=round((1 - cfg.average_last) * cfg.max_update) if cfg.average_last else None,
            fused=True,
            **self.optimizer_config,
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Settings that a resumed run takes from its own flags."""
        return {
            "lr": self.learning_rate,
            "betas": self.betas,
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }


def parse_betas(given: Any) -> tuple[float, float]:
    """Return the two decay rates of a text or a list.

    >>> parse_betas("(0.9, 0.999)")
    (0.9, 0.999)

    Args:
        given: text in the command line's notation, or a configuration's list.

    Raises:
        RKMError: anything but two numbers within [0, 1).
    """
    try:
        first, second = map(float, given.strip("()[] ").split(",") if isinstance(given, str) else given)
    except (TypeError, ValueError):
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise RKMError(f"--adam-betas must be two numbers within [0, 1), as '(0.9, 0.999)', not {given!r}")
    return first, second
