"""Trained classifiers of signals: arrays and files of recordings in, classes out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from torch import Tensor, nn

from fairseq_rkm.checkpoints.loading import Wanted, only
from fairseq_rkm.data.signals import SIGNALS_FILE, Recordings, SignalPreparation, window_starts
from fairseq_rkm.data.signals.array_files import from_arrays
from fairseq_rkm.data.signals.signal_dataset import pad
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.classification.classifier_hub import Prediction

MOST_STEPS = 1 << 17
"""The most steps of a batch, padding included; it bounds the memory for long windows."""


class WindowProbabilities(NamedTuple):
    """The classes' probabilities of windows.

    Attributes:
        recordings: ``(windows,)`` int64, the recording that each window is of, from 0.
        starts: ``(windows,)`` int64, each window's first step at the model's sampling rate.
        probabilities: ``(windows, classes)`` float32 on the CPU.
    """

    recordings: np.ndarray
    starts: np.ndarray
    probabilities: Tensor


class SignalHubInterface(nn.Module):
    """A classifier of recordings: the counterpart of fairseq's ``GeneratorHubInterface``.

    A recording is prepared as the training data were: resampled if they were, standardized by the training part's
    means and scales, cut into windows. Its probabilities are the mean of its windows'.

    Args:
        task: ``signal_classification``.
        model: an ``rkm_signal_classifier`` with the task's head.
    """

    def __init__(self, task: Any, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model.eval()
        self.preparation: SignalPreparation = task.preparation

    @property
    def classes(self) -> list[str]:
        """The classes' names."""
        return self.preparation.classes

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def predict(
        self, signals: Any, batch_size: int = 64, rate: float | None = None, groups: Sequence[Any] | None = None
    ) -> list[Prediction]:  # fmt: skip
        """The likeliest class of each recording.

        Args:
            signals: an array ``(recordings, channels, time)``, or a list of arrays ``(channels, time)``, in the units
                of the training data; or :class:`~fairseq_rkm.data.signals.Recordings`.
            batch_size: the most windows at a time; the results do not depend on it.
            rate: the array's samples a second; None is the training data's.
            groups: each recording's group, a person say, where signals are whitened by group.

        Raises:
            RKMError: other channels, another sampling rate, missing values, a recording shorter than a window, or no
                groups where they are needed.
        """
        probabilities, numbers = self.probabilities(signals, batch_size, rate, groups).max(dim=1)
        pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
        return [Prediction(self.classes[k], probability) for k, probability in pairs]

    def probabilities(
        self, signals: Any, batch_size: int = 64, rate: float | None = None, groups: Sequence[Any] | None = None
    ) -> Tensor:  # fmt: skip
        """The classes' probabilities of recordings, ``(recordings, classes)`` float32 on the CPU.

        The arguments and errors are those of :meth:`predict`.
        """
        recordings = _recordings(signals, rate, groups)
        if recordings is None:
            return torch.empty(0, len(self.classes))
        windows = self.windows(recordings, batch_size)
        numbers = torch.from_numpy(windows.recordings)
        total = torch.zeros(len(recordings), len(self.classes), dtype=torch.float64)
        total.index_add_(0, numbers, windows.probabilities.double())
        return (total / numbers.bincount(minlength=len(recordings)).unsqueeze(1)).float()

    def windows(
        self, signals: Any, batch_size: int = 64, rate: float | None = None, groups: Sequence[Any] | None = None
    ) -> WindowProbabilities:  # fmt: skip
        """The classes' probabilities of each window. The arguments and errors are those of :meth:`predict`."""
        if batch_size < 1:
            raise RKMError(f"the batch size must be at least 1, not {batch_size}")
        recordings = _recordings(signals, rate, groups)
        if recordings is None:
            none = np.empty(0, dtype=np.int64)
            return WindowProbabilities(none, none, torch.empty(0, len(self.classes)))
        recordings = self.preparation.fitted(recordings)
        window = self.preparation.window
        starts = window_starts(recordings, window, self.preparation.stride)
        pairs = [(number, start) for number, first in enumerate(starts) for start in first]
        pieces = []
        for number, first in enumerate(starts):
            steps = self.preparation.standardized(recordings.signals[number])
            pieces += [torch.from_numpy(steps[start : start + (window or len(steps))]) for start in first]
        numbers, begins = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
        return WindowProbabilities(numbers, begins, self.classified(pieces, batch_size))

    @torch.inference_mode()
    def classified(self, windows: list[Tensor], batch_size: int = 64) -> Tensor:
        """The classes' probabilities of standardized windows, ``(windows, classes)`` float32 on the CPU.

        Args:
            windows: each ``(time, channels)`` float32, as a prepared split holds them.
            batch_size: the most windows at a time; those of about one length go together.
        """
        results = torch.empty(len(windows), len(self.classes))
        order = np.argsort([len(window) for window in windows], kind="stable")
        at = 0
        while at < len(order):
            count = 1
            while count < batch_size and at + count < len(order):
                if len(windows[order[at + count]]) * (count + 1) > MOST_STEPS:
                    break
                count += 1
            rows = order[at : at + count]
            source, mask = pad([windows[i] for i in rows])
            logits = self._logits(source.to(self.device), None if mask is None else mask.to(self.device))
            results[torch.from_numpy(rows)] = logits.float().softmax(dim=1).cpu()
            at += count
        return results

    @torch.inference_mode()
    def confusion(self, split: str, batch_size: int = 64) -> Tensor:
        """Count a prepared split's windows of class i taken for class j: ``(classes, classes)`` int64.

        Raises:
            RKMError: the split is missing or damaged.
        """
        dataset = self.task.load_dataset(split)
        counts = torch.zeros(len(self.classes) ** 2, dtype=torch.int64)
        order = dataset.ordered_indices()
        for rows in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
            sample = dataset.collater([dataset[i] for i in rows])
            inputs = sample["net_input"]
            mask = inputs["padding_mask"]
            logits = self._logits(inputs["source"].to(self.device), None if mask is None else mask.to(self.device))
            counts += (sample["target"] * len(self.classes) + logits.argmax(1).cpu()).bincount(minlength=len(counts))
        return counts.view(len(self.classes), -1)

    def _logits(self, source: Tensor, mask: Tensor | None) -> Tensor:
        head = self.task.cfg.classification_head_name
        return self.model(source, mask, classification_head_name=head)[0]


def _recordings(signals: Any, rate: float | None, groups: Sequence[Any] | None) -> Recordings | None:
    """Recordings from what a user gives; None for none at all."""
    if isinstance(signals, Recordings):
        return signals
    if isinstance(signals, str | bytes | Path):
        raise RKMError("predict takes an array (recordings, channels, time): read a file with read_signals first")
    if isinstance(signals, Tensor):
        signals = signals.detach().cpu().numpy()
    if isinstance(signals, Sequence) and any(isinstance(one, Tensor) for one in signals):
        signals = [one.detach().cpu().numpy() if isinstance(one, Tensor) else one for one in signals]
    if isinstance(signals, np.ndarray) and signals.dtype == object:
        signals = list(signals)
    return from_arrays("the array", signals, group=groups, rate=rate) if len(signals) > 0 else None


def load_signal_classifier(
    wanted: Wanted, folder: str | Path, checkpoint_file: str, data: str | Path | None, overrides: dict[str, Any]
) -> SignalHubInterface:
    """See :meth:`fairseq_rkm.models.signals.rkm_signal_classifier.RKMSignalClassifier.from_pretrained`."""
    path = Path(folder, checkpoint_file)
    if not path.is_file():
        raise RKMError(f"no checkpoint at {path}: give the --save-dir of a training run and the checkpoint's name")
    if data is None and Path(folder, SIGNALS_FILE).is_file():
        data = folder
    if data is not None:
        overrides = {**overrides, "data": str(data)}
    with only(wanted):
        models, _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    return SignalHubInterface(task, models[0])
