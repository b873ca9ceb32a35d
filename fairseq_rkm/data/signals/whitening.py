"""Spectral whitening: each channel of a person is filtered until all frequencies are equally strong on the whole.

People's skulls, skins and electrodes colour a signal more than a task does. The filter is found from all recordings of
a group together and needs no classes. It takes from a person the mean spectrum, and leaves the differences between the
person's recordings.
"""

from collections.abc import Iterator

import numpy as np

from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError

WHITEN = ("group", "recording")
"""Whose mean spectrum is made flat."""
TAPS = 129
"""The length of the filters in samples."""
WELCH_SAMPLES = 256
"""The samples of a segment of Welch's estimate of a spectrum."""
LEAST_SHARE = 1e-4
"""What is added to a spectrum, in shares of its mean, lest the noise of empty bands be made as strong as a signal."""


def whitened(recordings: Recordings, by: str) -> Recordings:
    """Recordings with a flat mean spectrum and a variance of about 1, by channel and group.

    Args:
        recordings: complete ones.
        by: ``"group"`` makes flat the mean spectrum over all recordings of a group, ``"recording"`` that of each.

    Raises:
        RKMError: the recordings have no groups, one is shorter than :data:`WELCH_SAMPLES`, or a channel of a group is
            constant.
    """
    signals = list(recordings.signals)
    short = next((i for i, signal in enumerate(signals) if len(signal) < WELCH_SAMPLES), None)
    if short is not None:
        raise RKMError(
            f"{recordings.source}: recording {recordings.names[short]} has {len(signals[short]):,} steps, and "
            f"whitening needs {WELCH_SAMPLES:,}: leave it out, or do without --whiten"
        )
    for whose, rows in _sharing(recordings, by):
        constant = [recordings.channel(int(number)) for number in _constant([signals[i] for i in rows])]
        if constant:
            raise RKMError(
                f"{recordings.source}: channel {', '.join(constant)} of {whose} is constant and has no spectrum to "
                "whiten: leave it out (--drop-channels, or the recordings)"
            )
        taps = _filters(np.mean([_power(signals[i]) for i in rows], axis=0))
        for i in rows:
            signals[i] = _filtered(signals[i], taps)
    return recordings.with_signals(signals)


def _sharing(recordings: Recordings, by: str) -> Iterator[tuple[str, list[int]]]:
    """The recordings, by number, that share filters, and a name for them."""
    if by == "recording":
        for i, name in enumerate(recordings.names):
            yield f"recording {name}", [i]
        return
    if recordings.groups is None:
        raise RKMError(
            f"{recordings.source} has no groups, and signals are whitened by group: give each recording's group"
        )
    for group in dict.fromkeys(recordings.groups):
        yield f"group {group!r}", [i for i, one in enumerate(recordings.groups) if one == group]


def _constant(signals: list[np.ndarray]) -> np.ndarray:
    """The numbers of channels that are constant, but for rounding, in each of some signals."""
    varies = [signal.std(0, dtype=np.float64) > 1e-7 * np.abs(signal.mean(0, dtype=np.float64)) for signal in signals]
    return np.nonzero(~np.any(varies, axis=0))[0]


def _power(signal: np.ndarray) -> np.ndarray:
    """The power of each frequency, ``(WELCH_SAMPLES / 2 + 1, channels)``, by Welch's method."""
    from scipy.signal import welch

    _, power = welch(signal.astype(np.float64), nperseg=WELCH_SAMPLES, axis=0)
    return np.asarray(power)


def _filters(power: np.ndarray) -> np.ndarray:
    """Filters without phase, ``(TAPS, channels)``, whose gain is one over the root of a spectrum."""
    gain = (power + LEAST_SHARE * power.mean(0)) ** -0.5
    taps = np.roll(np.fft.irfft(gain, axis=0), TAPS // 2, axis=0)[:TAPS]
    return taps * np.hanning(TAPS + 2)[1:-1, None]


def _filtered(signal: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """A signal without its mean, filtered and of the same length, float32."""
    from scipy.signal import oaconvolve

    centred = signal - signal.mean(0, dtype=np.float64)
    return np.asarray(oaconvolve(centred, taps, mode="same", axes=0), dtype=np.float32)
