"""Labelled recordings of several channels, as every reader returns them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fairseq_rkm.errors import RKMError

SHOWN = 10
"""The most faults that an error lists."""


@dataclass
class Recordings:
    """Recordings of the same channels, perhaps of different lengths.

    Attributes:
        source: where they come from, for messages.
        signals: an array ``(time, channels)`` float32 for each recording.
        labels: each recording's class; None if the source has no classes.
        groups: each recording's group, a person say; None if the source has no groups.
        channels: the channels' names; None if the source does not name them.
        rate: samples a second; None if the source does not tell.
        names: each recording's name for messages; by default its number, from 1.
    """

    source: str
    signals: list[np.ndarray]
    labels: list[str] | None = None
    groups: list[str] | None = None
    channels: list[str] | None = None
    rate: float | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.signals:
            raise RKMError(f"{self.source} has no recordings")
        if not self.names:
            self.names = [str(number) for number in range(1, len(self.signals) + 1)]
        counts = {signal.shape[1] for signal in self.signals}
        if self.channels is not None:
            counts.add(len(self.channels))
        if len(counts) > 1:
            raise RKMError(f"{self.source}: recordings and names of channels differ in their number: {sorted(counts)}")
        if not self.width:
            raise RKMError(f"{self.source}: the recordings have no channels")
        if self.channels is not None and len(set(self.channels)) < len(self.channels):
            raise RKMError(f"{self.source}: two channels have one name")
        if self.rate is not None and not (np.isfinite(self.rate) and self.rate > 0):
            raise RKMError(f"{self.source}: the sampling rate must be a positive number of hertz, not {self.rate}")
        for what, values in (("classes", self.labels), ("groups", self.groups)):
            if values is not None and len(values) != len(self):
                raise RKMError(f"{self.source} has {len(values):,} {what} for {len(self):,} recordings")

    def __len__(self) -> int:
        return len(self.signals)

    @property
    def width(self) -> int:
        """The number of channels."""
        return int(self.signals[0].shape[1])

    def channel(self, number: int) -> str:
        """A channel's name, or its number from 1 if it has none."""
        return str(number + 1) if self.channels is None else repr(self.channels[number])

    def subset(self, rows: Sequence[int]) -> "Recordings":
        """The recordings of these rows, in this order."""

        def chosen(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[i] for i in rows]

        return replace(
            self, signals=[self.signals[i] for i in rows], labels=chosen(self.labels), groups=chosen(self.groups),
            names=[self.names[i] for i in rows],
        )  # fmt: skip

    def with_signals(self, signals: list[np.ndarray], rate: float | None = None) -> "Recordings":
        """The same recordings with other values, and perhaps at another rate."""
        return replace(self, signals=signals, rate=self.rate if rate is None else rate)

    def known_labels(self) -> list[str]:
        """The classes.

        Raises:
            RKMError: the source has none.
        """
        if self.labels is None:
            raise RKMError(f"{self.source} has no classes: give them as y, as a column label, or by --labels FILE")
        return self.labels


def joined(parts: Sequence[Recordings]) -> Recordings:
    """The recordings of several sources as one.

    Raises:
        RKMError: they differ in channels or sampling rate, or some have classes or groups and others have none.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        check_same(part, first.width, first.channels, first.rate, first.source)
        for what in ("labels", "groups"):
            if (getattr(part, what) is None) != (getattr(first, what) is None):
                raise RKMError(f"one of {first.source} and {part.source} has {what}, and the other has none")
    return Recordings(
        ", ".join(part.source for part in parts),
        [signal for part in parts for signal in part.signals],
        None if first.labels is None else [label for part in parts for label in part.known_labels()],
        None if first.groups is None else [group for part in parts for group in part.groups or []],
        first.channels,
        first.rate,
        [f"{name} of {part.source}" for part in parts for name in part.names],
    )


def check_same(found: Recordings, width: int, channels: list[str] | None, rate: float | None, whose: str) -> None:
    """Refuse recordings of other channels or of another sampling rate than wanted.

    Names and rates count where both sides have them.

    Raises:
        RKMError: tells the difference.
    """
    if found.width != width:
        raise RKMError(f"{found.source} has {found.width} channels, and {whose} {width}: give the same channels")
    if channels is not None and found.channels is not None and found.channels != channels:
        here, wanted = next((a, b) for a, b in zip(found.channels, channels, strict=True) if a != b)
        raise RKMError(
            f"{found.source} has the channel {here!r} where {whose} has {wanted!r}: give the same channels in the "
            "same order"
        )
    if rate is not None and found.rate is not None and not np.isclose(rate, found.rate, rtol=1e-6):
        raise RKMError(
            f"{found.source} has {found.rate:g} samples a second, and {whose} {rate:g}: resample it first (prepare.py "
            f"--resample {rate:g}Hz does so for all)"
        )


def check_finite(recordings: Recordings) -> None:
    """Refuse missing values (NaN) and infinities.

    Raises:
        RKMError: names the recording, the channel and the time of the first ones.
    """
    faults: list[str] = []
    count = 0
    for name, signal in zip(recordings.names, recordings.signals, strict=True):
        steps, channels = np.nonzero(~np.isfinite(signal))
        count += len(steps)
        for step, channel in zip(steps[: SHOWN - len(faults)], channels, strict=False):
            value = "missing" if np.isnan(signal[step, channel]) else "infinite"
            at = f"step {step + 1}"
            if recordings.rate is not None:
                at = f"{step / recordings.rate:.3f} s ({at})"
            faults.append(f"\n  recording {name}, channel {recordings.channel(int(channel))}, {at}: {value}")
    if count:
        more = f"\n  and {count - len(faults):,} more" if count > len(faults) else ""
        raise RKMError(
            f"{recordings.source}: {count:,} values are missing or infinite:{''.join(faults)}{more}\n"
            "Interpolate them, or leave these recordings out"
        )
