"""Tasks that validate and save the average of the weights, where the optimizer keeps one."""

from typing import Any, Optional

from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask

from fairseq_rkm.optim.averaging import put_average


class AveragedValidation(FairseqTask):
    """The task's part in :mod:`fairseq_rkm.optim.averaging`, to be inherited from before fairseq's own task.

    The average enters the model before a validation. It is still there when the checkpoint is written, which thus holds
    what was validated, with the weights beside it in the optimizer's state; these return before the next update.
    """

    validates_average = True
    optimizer: Optional[FairseqOptimizer] = None
    first_subset = True

    def train_step(
        self, sample: dict, model: Any, criterion: Any, optimizer: FairseqOptimizer, update_num: int, **kwargs: Any
    ) -> tuple:
        """fairseq's, with the weights in the model."""
        self.optimizer = optimizer
        put_average(optimizer, average_in=False)
        return super().train_step(sample, model, criterion, optimizer, update_num, **kwargs)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """The hook of fairseq before validation."""
        super().begin_valid_epoch(epoch, model)
        self.first_subset = True
        if self.optimizer is not None:
            put_average(self.optimizer, average_in=True)

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """The hook of fairseq after each validation set: the first one's loss, unrounded, may begin the averaging."""
        record = getattr(getattr(self.optimizer, "optimizer", None), "record", None)
        if self.first_subset and record is not None:
            record(float(agg["loss"].avg))
        self.first_subset = False
