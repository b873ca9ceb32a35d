"""``signal_classification``: windows of several channels, each of one class."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II

from fairseq_rkm.data.signals import SignalDataset, SignalPreparation, open_split
from fairseq_rkm.errors import RKMError
from fairseq_rkm.tasks.averaged_validation import AveragedValidation

logger = logging.getLogger(__name__)


@dataclass
class SignalClassificationConfig(FairseqDataclass):
    """Flags of ``--task signal_classification``."""

    data: Optional[str] = field(default=None, metadata={"help": "folder of prepared data"})
    no_shuffle: bool = field(default=False, metadata={"help": "batches of the same windows every epoch"})
    classification_head_name: str = II("criterion.classification_head_name")
    regression_target: bool = II("criterion.regression_target")
    train_subset: str = II("dataset.train_subset")


@register_task("signal_classification", dataclass=SignalClassificationConfig)
class SignalClassificationTask(AveragedValidation, FairseqTask):
    """Classification of multichannel signals, with fairseq's criterion ``sentence_prediction``.

        fairseq-train DATA --user-dir fairseq_rkm --task signal_classification --criterion sentence_prediction \
            --arch rkm_signal_classifier --optimizer adam --lr 0.001 --batch-size 32

    DATA is a folder from ``examples/signals/prepare.py``. It tells the classes, the channels and the sampling rate.
    """

    architecture = "rkm_signal_classifier"

    def __init__(self, cfg: SignalClassificationConfig, preparation: SignalPreparation, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self.preparation = preparation
        self.label_dictionary = Dictionary()  # the criterion's reports read classes as numbers from 1
        for number in range(1, len(preparation.classes) + 1):
            self.label_dictionary.add_symbol(str(number))

    @classmethod
    def setup_task(cls, cfg: SignalClassificationConfig, **_kwargs: Any) -> "SignalClassificationTask":
        """Read what the data are.

        Raises:
            RKMError: the folder lacks ``signals.json``, or the criterion wants numbers in place of classes.
        """
        if cfg.regression_target:
            raise RKMError("--regression-target is for numbers, and signals here have classes: leave it out")
        if not cfg.data:
            raise RKMError("--task signal_classification needs the folder that examples/signals/prepare.py wrote")
        preparation = SignalPreparation.load(Path(cfg.data))
        rate = "unknown" if preparation.rate is None else f"{preparation.rate:g} Hz"
        logger.info(f"{len(preparation.classes)} classes, {preparation.width} channels, sampling rate {rate}")
        return cls(cfg, preparation)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False) -> Any:
        """Build a model and its head for the data's classes."""
        model = super().build_model(cfg, from_checkpoint)
        model.register_classification_head(self.cfg.classification_head_name, num_classes=len(self.preparation.classes))
        return model

    def load_dataset(self, split: str, **_kwargs: Any) -> SignalDataset:
        """Open a split.

        Raises:
            RKMError: the split is missing or damaged.
        """
        folder = Path(self.cfg.data)
        opened = open_split(folder, split, self.preparation.width, len(self.preparation.classes))
        dataset = SignalDataset(opened, shuffle=split == self.cfg.train_subset and not self.cfg.no_shuffle)
        self.datasets[split] = dataset
        logger.info(f"{folder} {split}: {len(dataset):,} windows")
        return dataset

    def max_positions(self) -> None:
        """A recurrence reads windows of any length."""
        return

    @property
    def source_dictionary(self) -> None:
        """None: signals have no symbols."""
        return None

    @property
    def target_dictionary(self) -> Dictionary:
        """The classes, numbered from 1."""
        return self.label_dictionary
