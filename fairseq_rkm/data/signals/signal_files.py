"""One reader for files of recordings; the end of a file's name tells its kind."""

from collections.abc import Callable
from pathlib import Path

from fairseq_rkm.data.signals.array_files import read_npy, read_npz
from fairseq_rkm.data.signals.library_files import read_fif, read_ts
from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.data.signals.table_files import read_csv
from fairseq_rkm.errors import RKMError

READERS: dict[str, Callable[[Path], Recordings]] = {
    ".npz": read_npz, ".npy": read_npy, ".csv": read_csv, ".ts": read_ts, ".fif": read_fif,
}  # fmt: skip
"""Readers by the end of the file's name."""


def read_signals(path: Path, labels: Path | None = None, groups: Path | None = None) -> Recordings:
    """Read recordings.

    >>> recordings = read_signals(Path("train.npz"))
    >>> recordings.signals[0].shape  # (time, channels)

    Args:
        path: a file that ends in .npz, .npy, .csv, .ts or .fif.
        labels: a file with a class a line, in place of those in ``path``.
        groups: a file with a group a line, in place of those in ``path``.

    Raises:
        RKMError: a file is missing, damaged or of another form.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise RKMError(
            f"{path}: recordings are read from {', '.join(READERS)}, not from {path.suffix or 'such a file'}"
        )
    if not path.is_file():
        raise RKMError(f"no file of recordings at {path}")
    recordings = reader(path)
    for what, file in (("labels", labels), ("groups", groups)):
        if file is not None:
            setattr(recordings, what, _lines(file, len(recordings), what))
    return recordings


def _lines(path: Path, wanted: int, what: str) -> list[str]:
    """The lines of a file of classes or groups."""
    if not path.is_file():
        raise RKMError(f"no file of {what} at {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise RKMError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if len(lines) != wanted or not all(lines):
        empty = next((f", and line {number} is empty" for number, line in enumerate(lines, 1) if not line), "")
        raise RKMError(f"{path} has {len(lines):,} lines for {wanted:,} recordings{empty}: give one a recording")
    return lines
