"""Recordings in NumPy's files. Nothing in them is unpickled: a file from a stranger runs no code."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError, first_line

NAMES = {
    "x": ("x", "X"),
    "y": ("y", "label", "labels"),
    "group": ("group", "groups", "subject", "subjects"),
    "channels": ("channels", "channel_names"),
    "rate": ("rate", "fs", "sfreq", "sampling_rate"),
    "lengths": ("lengths",),
}
"""The names that an array of an .npz file may have, by its meaning."""

OBJECTS = (
    "holds Python objects, which could run code when they are read: save plain numbers and text. Recordings of "
    "different lengths go into one array, padded at the end, with an array lengths beside it"
)


def read_npz(path: Path) -> Recordings:
    """Read ``x`` and, where there are such, ``y``, ``group``, ``channels``, ``rate`` and ``lengths``.

    ``x`` is ``(recordings, channels, time)``, as aeon and MNE have it, or ``(recordings, time)`` of one channel.
    ``lengths`` ``(recordings,)`` tells where each recording ends; the rest of ``x`` is not read.

    Raises:
        RKMError: an array is missing, of objects, or does not fit the others.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise RKMError(f"{path} is no .npz archive, but a single array")
            found = {meaning: _member(path, archive, names) for meaning, names in NAMES.items()}
            others = sorted(archive.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, RKMError):
            raise
        raise RKMError(f"{path} is damaged, or no .npz file: {first_line(error)}") from None
    if found["x"] is None:
        raise RKMError(f"{path} has no array x; its arrays are {', '.join(others) or 'none'}")
    return from_arrays(str(path), **found)


def read_npy(path: Path) -> Recordings:
    """Read one array ``(recordings, channels, time)`` or ``(recordings, time)``.

    Raises:
        RKMError: the file is damaged, or of objects.
    """
    return from_arrays(str(path), load_array(path))


def load_array(path: Path) -> np.ndarray:
    """Read one .npy file.

    Raises:
        RKMError: it is damaged, or of objects.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = OBJECTS if "allow_pickle" in str(error) else f"is damaged, or no .npy file: {first_line(error)}"
        raise RKMError(f"{path} {reason}") from None
    if not isinstance(array, np.ndarray):
        raise RKMError(f"{path} is an archive of arrays: give it the ending .npz")
    return array


def _member(path: Path, archive: Any, names: tuple[str, ...]) -> np.ndarray | None:
    """The array of one of these names, or None."""
    name = next((name for name in names if name in archive.files), None)
    if name is None:
        return None
    try:
        return np.asarray(archive[name])
    except ValueError as error:
        reason = OBJECTS if "allow_pickle" in str(error) else f"is damaged: {first_line(error)}"
        raise RKMError(f"{path}: the array {name} {reason}") from None


def from_arrays(
    source: str,
    x: Any,
    y: Any = None,
    group: Any = None,
    channels: Any = None,
    rate: Any = None,
    lengths: Any = None,
) -> Recordings:
    """Recordings from arrays.

    Args:
        source: for messages.
        x: ``(recordings, channels, time)`` or ``(recordings, time)`` numbers, or a list of arrays ``(channels, time)``.
        y: ``(recordings,)`` classes.
        group: ``(recordings,)`` groups.
        channels: ``(channels,)`` names.
        rate: samples a second.
        lengths: ``(recordings,)`` int.

    Raises:
        RKMError: shapes or dtypes do not fit.
    """
    if isinstance(x, list | tuple):
        signals = [_steps(source, np.asarray(one), number) for number, one in enumerate(x, 1)]
    else:
        signals = _rows(source, np.asarray(x))
    if lengths is not None:
        signals = _cut(source, signals, np.asarray(lengths))
    return Recordings(
        source, signals, _texts(source, "y", y), _texts(source, "group", group), _texts(source, "channels", channels),
        _rate(source, rate),
    )  # fmt: skip


def _rows(source: str, x: np.ndarray) -> list[np.ndarray]:
    if x.ndim == 2:
        x = x[:, None]
    if x.ndim != 3:
        raise RKMError(
            f"{source}: x must have the axes (recordings, channels, time), or (recordings, time), not "
            f"{x.ndim} axes of sizes {tuple(x.shape)}"
        )
    return [_steps(source, one, number) for number, one in enumerate(x, 1)]


def _steps(source: str, one: np.ndarray, number: int) -> np.ndarray:
    """``(channels, time)`` numbers as ``(time, channels)`` float32."""
    if one.dtype == object or one.dtype.kind not in "iufb":
        raise RKMError(f"{source}: recording {number} must hold real numbers, not {one.dtype}")
    if one.ndim != 2:
        raise RKMError(f"{source}: recording {number} must have the axes (channels, time), not {one.ndim} axes")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which check_finite names
        return np.ascontiguousarray(one.T, dtype=np.float32)


def _cut(source: str, signals: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    fits = lengths.shape == (len(signals),) and lengths.dtype.kind in "iu"
    if not fits or any(not 0 < length <= len(one) for length, one in zip(lengths, signals, strict=True)):
        raise RKMError(f"{source}: lengths must tell, for each recording, a number of steps from 1 to those in x")
    return [one[: int(length)] for one, length in zip(signals, lengths, strict=True)]


def _texts(source: str, name: str, values: Any) -> list[str] | None:
    """Classes, groups or names as text: 1.0 is 1, and bytes are decoded."""
    if values is None:
        return None
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iufbUS":
        raise RKMError(
            f"{source}: {name} must be one row of numbers or text, not {array.dtype} of shape {tuple(array.shape)}"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise RKMError(f"{source}: {name} has missing values, the first at {_first(~np.isfinite(array))}")
        if (array == np.round(array)).all():
            array = array.astype(np.int64)
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in array.tolist()]


def _first(wrong: np.ndarray) -> int:
    return int(np.argmax(wrong)) + 1


def _rate(source: str, rate: Any) -> float | None:
    if rate is None:
        return None
    array = np.asarray(rate)
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise RKMError(f"{source}: the sampling rate must be one number, not {array.dtype} of shape {array.shape}")
    return float(array.reshape(()))
