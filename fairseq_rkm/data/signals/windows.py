"""Durations, resampling, windows and scales of recordings."""

import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError

UNITS = {"": None, "s": 1.0, "ms": 1e-3, "min": 60.0}
MOST_OF_A_RATIO = 10_000
"""The largest number in a ratio of two sampling rates."""


@dataclass(frozen=True)
class Duration:
    """A length of time, in seconds or in steps.

    >>> Duration.parse("2s", "--window").steps(125), Duration.parse("250", "--window").steps(None)
    (250, 250)

    Attributes:
        flag: the flag that gave it, for messages.
        number: so many steps, or seconds.
        seconds: whether ``number`` counts seconds.
    """

    flag: str
    number: float
    seconds: bool

    @classmethod
    def parse(cls, text: str, flag: str) -> "Duration":
        """Read ``"2s"``, ``"500ms"``, ``"1min"``, or ``"250"`` for steps.

        Raises:
            RKMError: the text is no positive duration.
        """
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|ms|min|)\s*", text)
        number = float(found[1]) if found else 0.0
        unit = UNITS[found[2]] if found else None
        if number <= 0 or (unit is None and number != int(number)):
            raise RKMError(f"{flag} takes a time as 2s or 500ms, or a whole number of steps, not {text!r}")
        return cls(flag, number if unit is None else number * unit, unit is not None)

    def steps(self, rate: float | None) -> int:
        """The steps at a sampling rate, rounded.

        Raises:
            RKMError: it is in seconds and the rate is unknown, or it is shorter than a step.
        """
        if not self.seconds:
            return int(self.number)
        if rate is None:
            raise RKMError(f"{self.flag} is in seconds, and the sampling rate is not known: give --rate, or steps")
        steps = round(self.number * rate)
        if steps < 1:
            raise RKMError(f"{self.flag} of {self.number:g} s is shorter than a step at {rate:g} samples a second")
        return steps


def resampled(recordings: Recordings, rate: float) -> Recordings:
    """Recordings at another sampling rate, by a polyphase filter (``scipy.signal.resample_poly``).

    Raises:
        RKMError: their rate is unknown, or the two rates have no simple ratio.
    """
    from scipy.signal import resample_poly

    if recordings.rate is None:
        raise RKMError(f"{recordings.source} has no sampling rate to resample from: give --rate")
    ratio = Fraction(rate / recordings.rate).limit_denominator(MOST_OF_A_RATIO)
    if not 0 < ratio.numerator <= MOST_OF_A_RATIO or not np.isclose(float(ratio), rate / recordings.rate, rtol=1e-6):
        raise RKMError(f"cannot resample from {recordings.rate:g} to {rate:g} samples a second: no simple ratio")
    if ratio == 1:
        return recordings
    signals = [
        resample_poly(signal.astype(np.float64), ratio.numerator, ratio.denominator, axis=0, padtype="line").astype(
            np.float32
        )
        for signal in recordings.signals
    ]
    return recordings.with_signals(signals, rate)


def window_starts(recordings: Recordings, window: int | None, stride: int) -> list[list[int]]:
    """The first steps of each recording's windows; without ``window`` a recording is one window.

    A rest at a recording's end that is shorter than a window is left out.

    Raises:
        RKMError: a recording is shorter than a window, or empty.
    """
    starts = []
    for name, signal in zip(recordings.names, recordings.signals, strict=True):
        if len(signal) < (window or 1):
            wanted = f"a window of {window:,} steps" if window else "one step"
            raise RKMError(
                f"{recordings.source}: recording {name} has {len(signal):,} steps, fewer than {wanted}: leave it out"
                + (", or give a shorter --window" if window else "")
            )
        starts.append(list(range(0, len(signal) - window + 1, stride)) if window else [0])
    return starts


def scales(recordings: Recordings) -> tuple[np.ndarray, np.ndarray]:
    """Each channel's mean and standard deviation over all steps.

    Returns:
        Two arrays ``(channels,)`` float64.

    Raises:
        RKMError: a channel is constant.
    """
    count = sum(len(signal) for signal in recordings.signals)
    mean = sum(signal.sum(0, dtype=np.float64) for signal in recordings.signals) / count
    squares = sum(np.square(signal - mean).sum(0, dtype=np.float64) for signal in recordings.signals)
    deviation = np.sqrt(squares / count)
    # Rounding leaves a constant float32 channel with a deviation of some 1e-8 of its size.
    constant = np.nonzero(deviation <= 1e-7 * np.abs(mean))[0]
    if len(constant):
        named = ", ".join(recordings.channel(int(number)) for number in constant)
        raise RKMError(
            f"{recordings.source}: channel {named} is constant in the training part, and nothing can be learnt from "
            "it: leave it out (--drop-channels)"
        )
    return np.asarray(mean), deviation
