"""Trained classifiers of raw text, and their errors counted class by class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from torch import Tensor, nn

import fairseq_rkm
from fairseq_rkm.checkpoints.loading import Wanted, only
from fairseq_rkm.data.preparation import PREPARATION_FILE, Preparation
from fairseq_rkm.errors import RKMError

MAX_TOKENS = 16384
"""The most tokens of a batch, padding included; it bounds the memory for long documents."""


class Prediction(NamedTuple):
    """A document's likeliest class and its probability."""

    label: str
    probability: float


class ClassifierHubInterface(nn.Module):
    """A classifier of raw text: the counterpart of fairseq's ``GeneratorHubInterface``.

    Args:
        task: fairseq's ``sentence_prediction``.
        model: a classifier with the task's head.

    Raises:
        RKMError: the task's data lack a ``preparation.json``, or it has another number of classes.
    """

    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model.eval()
        self.preparation = Preparation.load(Path(task.cfg.data))
        if len(self.classes) != task.cfg.num_classes:
            raise RKMError(
                f"{Path(task.cfg.data, PREPARATION_FILE)} has {len(self.classes)} classes and the model "
                f"{task.cfg.num_classes}: give the data that it was trained on"
            )

    @property
    def classes(self) -> list[str]:
        """The classes' names."""
        return self.preparation.classes

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def encode(self, text: str) -> Tensor:
        """A document's tokens, ``(length,)`` int64; the end-of-sentence symbol comes last."""
        dictionary = self.task.source_dictionary
        return dictionary.encode_line(self.preparation.tokens(text), add_if_not_exist=False).long()

    def predict(self, texts: Sequence[str], batch_size: int = 64) -> list[Prediction]:
        """The likeliest class of each text.

        Args:
            texts: any number of texts, of any length; an empty text is a document too.
            batch_size: the most texts at a time; the results do not depend on it.

        Raises:
            RKMError: ``texts`` is one string, or ``batch_size`` is below 1.
        """
        if isinstance(texts, str):
            raise RKMError("predict takes a list of texts: [text] for one")
        probabilities, numbers = self.probabilities([self.encode(text) for text in texts], batch_size).max(dim=1)
        pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        return [Prediction(self.classes[k], probability) for k, probability in pairs]

    @torch.inference_mode()
    def probabilities(self, documents: Sequence[Tensor], batch_size: int = 64) -> Tensor:
        """The classes' probabilities of encoded documents, ``(documents, classes)`` float32 on the CPU."""
        if batch_size < 1:
            raise RKMError(f"the batch size must be at least 1, not {batch_size}")
        results = torch.empty(len(documents), len(self.classes))
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        most_tokens = max([MAX_TOKENS, *lengths.tolist()])
        by_length = np.argsort(lengths, kind="stable")
        for rows in data_utils.batch_by_size(
            by_length, lengths.__getitem__, lengths[by_length], most_tokens, batch_size
        ):
            tokens = data_utils.collate_tokens([documents[i] for i in rows], self.task.source_dictionary.pad())
            results[rows] = self._logits(tokens.to(self.device)).float().softmax(dim=1).cpu()
        return results

    @torch.inference_mode()
    def confusion(self, split: str, batch_size: int = 64) -> Tensor:
        """Count a binarized split's documents of class i taken for class j: ``(classes, classes)`` int64.

        Raises:
            RKMError: the split is missing, empty or without labels.
        """
        dataset = self.task.load_dataset(split)
        (lengths,) = dataset.sizes
        iterator = self.task.get_batch_iterator(
            dataset, max_tokens=max(MAX_TOKENS, lengths.max()), max_sentences=batch_size
        ).next_epoch_itr(shuffle=False)
        counts = torch.zeros(len(self.classes) ** 2, dtype=torch.int64)
        for sample in iterator:
            predicted = self._logits(sample["net_input"]["src_tokens"].to(self.device)).argmax(dim=1).cpu()
            pairs = sample["target"].view(-1) * len(self.classes) + predicted
            counts += pairs.bincount(minlength=len(counts))
        return counts.view(len(self.classes), -1)

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, classification_head_name=self.task.cfg.classification_head_name)[0]


def load_classifier(
    wanted: Wanted, folder: str | Path, checkpoint_file: str, data: str | Path | None, overrides: dict[str, Any]
) -> ClassifierHubInterface:
    """See :meth:`fairseq_rkm.models.classification.rkm_classifier.RKMClassifier.from_pretrained`."""
    fairseq_rkm.register()
    path = Path(folder, checkpoint_file)
    if not path.is_file():
        raise RKMError(f"no checkpoint at {path}: give the --save-dir of a training run and the checkpoint's name")
    if data is None and Path(folder, PREPARATION_FILE).is_file():
        data = folder
    if data is not None:
        overrides = {**overrides, "data": str(data)}
    with only(wanted):
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    return ClassifierHubInterface(task, models[0])
