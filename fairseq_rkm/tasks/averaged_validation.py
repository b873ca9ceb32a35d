"""Tasks that validate and save the average of the weights, where the optimizer keeps one."""

from typing import Any, Optional

from fairseq.optim import FairseqOptimizer
from fairseq.tasks import FairseqTask

from fairseq_rkm.optim.averaging import put_average


class AveragedValidation(FairseqTask):
    """The task's part in :mod:`fairseq_rkm.optim.averaging`. A task inherits from it before fairseq's own task.

        class MyTask(AveragedValidation, LanguageModelingTask): ...

    The average enters the model before a validation, and stays until the checkpoint is written. So the checkpoint's
    model has the average, as validated. The weights themselves are in the optimizer's state. They return to the model
    before the next update.
    """

    validates_average = True
    optimizer: Optional[FairseqOptimizer] = None
    first_subset = True

    def train_step(
        self, sample: dict, model: Any, criterion: Any, optimizer: FairseqOptimizer, update_num: int, **kwargs: Any
    ) -> tuple:
        """Do fairseq's step, with the weights in the model."""
        self.optimizer = optimizer
        put_average(optimizer, average_in=False)
        return super().train_step(sample, model, criterion, optimizer, update_num, **kwargs)

    def begin_valid_epoch(self, epoch: int, model: Any) -> None:
        """Put the average into the model. fairseq calls this before validation."""
        super().begin_valid_epoch(epoch, model)
        self.first_subset = True
        if self.optimizer is not None:
            put_average(self.optimizer, average_in=True)

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Give the first validation set's unrounded loss to the optimizer. It may begin to average.

        fairseq calls this after each validation set.
        """
        record = getattr(getattr(self.optimizer, "optimizer", None), "record", None)
        if self.first_subset and record is not None:
            record(float(agg["loss"].avg))
        self.first_subset = False
