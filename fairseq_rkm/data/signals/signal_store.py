"""A split on disk: all recordings one after the other, memory-mapped, and the table of its windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fairseq_rkm.errors import RKMError, first_line

VALUES, WINDOWS = "values.npy", "windows.npy"
COLUMNS = 4
"""Of the table of windows: first step, steps, class and recording."""


class Split(NamedTuple):
    """A split.

    Attributes:
        values: ``(steps, channels)`` float32, memory-mapped: the recordings one after the other, standardized.
        starts: ``(windows,)`` int64, each window's first step.
        lengths: ``(windows,)`` int64, each window's steps.
        labels: ``(windows,)`` int64, each window's class from 0.
        recordings: ``(windows,)`` int64, the recording that each window is of, from 0.
    """

    values: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    recordings: np.ndarray


def write_split(
    folder: Path, split: str, signals: Sequence[np.ndarray], labels: Sequence[int], starts: Sequence[Sequence[int]],
    window: int | None,
) -> int:  # fmt: skip
    """Write ``SPLIT.values.npy`` and ``SPLIT.windows.npy``.

    Args:
        folder: where they go.
        split: the split's name.
        signals: the recordings, each ``(time, channels)`` float32.
        labels: each recording's class from 0.
        starts: each recording's first steps of windows.
        window: a window's steps; None for whole recordings.

    Returns:
        The number of windows.
    """
    rows, offset = [], 0
    for number, (signal, label, first) in enumerate(zip(signals, labels, starts, strict=True)):
        rows += [(offset + start, window or len(signal), label, number) for start in first]
        offset += len(signal)
    values = np.lib.format.open_memmap(
        folder / f"{split}.{VALUES}", mode="w+", dtype=np.float32, shape=(offset, signals[0].shape[1])
    )
    at = 0
    for signal in signals:
        values[at : at + len(signal)] = signal
        at += len(signal)
    values.flush()
    np.save(folder / f"{split}.{WINDOWS}", np.array(rows, dtype=np.int64), allow_pickle=False)
    return len(rows)


def open_split(folder: Path, split: str, channels: int, classes: int) -> Split:
    """Open a split that :func:`write_split` wrote, and check it whole.

    Args:
        folder: the folder of the data.
        split: the split's name.
        channels: the number of channels that it must have.
        classes: labels must lie below.

    Raises:
        RKMError: a file is missing or damaged, or its contents do not fit.
    """
    values, table = (_open(folder / f"{split}.{name}", split) for name in (VALUES, WINDOWS))
    where = f"the split {split!r} in {folder}"
    if values.ndim != 2 or values.dtype != np.float32 or values.shape[1] != channels:
        raise RKMError(
            f"{where} has values {values.dtype} of shape {tuple(values.shape)}, where {channels} channels of float32 "
            "are wanted: prepare the data anew"
        )
    if table.ndim != 2 or table.shape[1] != COLUMNS or table.dtype != np.int64 or not len(table):
        raise RKMError(f"{where} has no windows, or a damaged table of them: prepare the data anew")
    starts, lengths, labels, recordings = table.T.copy()
    if starts.min() < 0 or lengths.min() < 1 or (starts + lengths).max() > len(values):
        raise RKMError(f"{where} has windows beyond its recordings: was it cut off? Prepare the data anew")
    if labels.min() < 0 or labels.max() >= classes:
        number = int(np.argmax((labels < 0) | (labels >= classes)))
        raise RKMError(f"{where}: window {number + 1} is of class {labels[number] + 1}, and there are {classes}")
    for at in range(0, len(values), 1 << 20):
        wrong = ~np.isfinite(values[at : at + (1 << 20)]).all(1)
        if wrong.any():
            raise RKMError(f"{where}: a value is missing or infinite at step {at + int(np.argmax(wrong)) + 1}")
    return Split(values, starts, lengths, labels, recordings)


def _open(path: Path, split: str) -> np.ndarray:
    if not path.is_file():
        raise RKMError(f"no split {split!r} at {path}: give the folder that examples/signals/prepare.py wrote")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RKMError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(array, np.ndarray):
        raise RKMError(f"{path} is damaged: it is no array")
    return array
