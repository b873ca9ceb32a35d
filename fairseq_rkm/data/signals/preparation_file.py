"""The steps from a recording to a model's input. They are saved with the data, for recordings to come."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_rkm.data.signals.recordings import Recordings, check_finite, check_same
from fairseq_rkm.data.signals.whitening import WHITEN, whitened
from fairseq_rkm.data.signals.windows import resampled
from fairseq_rkm.errors import RKMError

SIGNALS_FILE = "signals.json"


@dataclass
class SignalPreparation:
    """Turn recordings into a model's input, and classes into names.

    Attributes:
        classes: the classes' names, in the order of the model's numbers.
        channels: the channels' names, or None.
        mean: each channel's mean in the training part.
        deviation: each channel's standard deviation in the training part.
        rate: samples a second, or None if unknown.
        resample: whether recordings of other rates are resampled to ``rate``.
        window: steps of a window; None takes recordings whole.
        stride: steps from one window to the next.
        dropped: numbers from 0 of the source's channels that are left out.
        whiten: one of :data:`~fairseq_rkm.data.signals.whitening.WHITEN`, or None to leave spectra as they are.
    """

    classes: list[str]
    channels: list[str] | None
    mean: list[float]
    deviation: list[float]
    rate: float | None = None
    resample: bool = False
    window: int | None = None
    stride: int = 1
    dropped: list[int] | None = None
    whiten: str | None = None

    @property
    def width(self) -> int:
        """The number of channels."""
        return len(self.mean)

    def fitted(self, recordings: Recordings) -> Recordings:
        """Recordings with this model's channels, rate and whitening.

        Raises:
            RKMError: they have other channels or another rate, values are missing, or they cannot be whitened.
        """
        if self.dropped and recordings.width == self.width + len(self.dropped):
            recordings = without_channels(recordings, self.dropped)
        check_same(recordings, self.width, self.channels, None if self.resample else self.rate, "the model")
        check_finite(recordings)
        other = recordings.rate is not None and self.rate is not None and not np.isclose(recordings.rate, self.rate)
        if self.resample and other and self.rate:
            recordings = resampled(recordings, self.rate)
        return whitened(recordings, self.whiten) if self.whiten else recordings

    def standardized(self, signal: np.ndarray) -> np.ndarray:
        """A recording, ``(time, channels)``, in standard deviations from the mean, float32."""
        return ((signal - np.array(self.mean)) / np.array(self.deviation)).astype(np.float32)

    def save(self, folder: Path) -> None:
        """Write ``signals.json`` into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / SIGNALS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SignalPreparation":
        """Read the file that :meth:`save` wrote.

        Raises:
            RKMError: there is none, or its contents are not as they should be.
        """
        path = folder / SIGNALS_FILE
        if not path.is_file():
            raise RKMError(
                f"no {path}: it names the classes and channels of the signals. Give the folder that "
                "examples/signals/prepare.py wrote"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise RKMError(f"{path} is not JSON: {error}") from None
        keys = [field.name for field in fields(cls)]
        if isinstance(values, dict):
            values.setdefault("whiten", None)  # files from before there was whitening
        if not isinstance(values, dict) or set(values) != set(keys):
            raise RKMError(f"{path} must have the keys {', '.join(keys)}")
        fault = _fault(values)
        if fault:
            raise RKMError(f"{path}: {fault}")
        return cls(**values)


def _fault(values: dict[str, Any]) -> str | None:
    """What is wrong in the contents of a file, or None."""
    channels, mean, deviation = values["channels"], values["mean"], values["deviation"]
    if not _all(values["classes"], str) or len(values["classes"]) < 2:
        return "classes must be a list of two names or more"
    if not _numbers(mean) or not _numbers(deviation) or len(mean) != len(deviation) or min(deviation) <= 0:
        return "mean and deviation must be numbers for each channel, the latter above 0"
    if channels is not None and (not _all(channels, str) or len(channels) != len(mean)):
        return "channels must be null, or a name for each number of mean"
    if values["rate"] is not None and not (_numbers([values["rate"]]) and values["rate"] > 0):
        return "rate must be null or a positive number"
    if values["dropped"] is not None and not _all(values["dropped"], int):
        return "dropped must be null or numbers of channels"
    steps = [values["stride"]] if values["window"] is None else [values["stride"], values["window"]]
    if not isinstance(values["resample"], bool) or not all(type(step) is int and step > 0 for step in steps):
        return "resample must be true or false, window null or a number of steps, and stride a number of steps"
    if values["whiten"] not in {None, *WHITEN}:
        return f"whiten must be null or one of {', '.join(WHITEN)}"
    return None


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


def _numbers(values: Any) -> bool:
    finite = isinstance(values, list) and all(type(value) in {int, float} and math.isfinite(value) for value in values)
    return finite and bool(values)


def without_channels(recordings: Recordings, dropped: list[int]) -> Recordings:
    """Recordings without channels, numbered from 0.

    Raises:
        RKMError: no channel would be left.
    """
    kept = [number for number in range(recordings.width) if number not in dropped]
    if not kept:
        raise RKMError(f"{recordings.source}: no channel is left")
    return Recordings(
        recordings.source, [np.ascontiguousarray(signal[:, kept]) for signal in recordings.signals], recordings.labels,
        recordings.groups, recordings.channels and [recordings.channels[number] for number in kept], recordings.rate,
        recordings.names,
    )  # fmt: skip
