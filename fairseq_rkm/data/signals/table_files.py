"""Recordings in CSV files: a channel a column, a step a row."""

import csv
import sys
from pathlib import Path

import numpy as np

from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError

RECORDING, FILE, TIME = "recording", "file", "time"
LABEL, GROUP = "label", "group"
MISSING = {"", "na", "n/a", "nan", "null", "none", "?"}
"""Fields that stand for a missing value, in lower case."""


def read_csv(path: Path) -> Recordings:
    """Read one table of all recordings, or an index of a table each. The first row names the columns.

    A table has a column ``recording``, and perhaps ``label``, ``group`` and ``time`` (seconds); all others are
    channels. Rows of one recording follow each other in time. Without ``recording`` the table is one recording.

    An index has a column ``file``, perhaps ``label`` and ``group``, and no channels. Each file, named from the index's
    folder, is a table of one recording.

    Raises:
        RKMError: a row is broken, a value is no number, or a recording has two classes or groups.
    """
    header, rows = _read(path)
    if FILE in header:
        return _indexed(path, header, rows)
    return _table(path, header, rows)


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns' names, and the rows with their lines in the file."""
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise RKMError(f"{path} is no CSV file of UTF-8 text: {error}") from None
    if not header or len(set(header)) < len(header) or not all(header):
        raise RKMError(f"{path}: the first row must name all columns, each by a name of its own")
    for line, row in rows:
        if len(row) != len(header):
            raise RKMError(f"{path}, line {line}: {len(row)} fields, where the first row names {len(header)}")
    if not rows:
        raise RKMError(f"{path} has no rows below the names of its columns")
    return header, rows


def _table(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Recordings:
    special = {name: header.index(name) for name in (RECORDING, LABEL, GROUP, TIME) if name in header}
    columns = [number for number in range(len(header)) if number not in special.values()]
    if not columns:
        raise RKMError(f"{path} has no columns of channels beside {', '.join(header)}")
    blocks: dict[str, list[tuple[int, list[str]]]] = {}
    last = None
    for line, row in rows:
        name = row[special[RECORDING]].strip() if RECORDING in special else "1"
        if name != last and name in blocks:
            raise RKMError(f"{path}, line {line}: recording {name!r} goes on after another one: sort the rows")
        blocks.setdefault(name, []).append((line, row))
        last = name
    signals = [_numbers(path, header, columns, block) for block in blocks.values()]
    labels, groups = (
        [_one_of(path, header, special[what], name, block) for name, block in blocks.items()] if what in special
        else None
        for what in (LABEL, GROUP)
    )  # fmt: skip
    channels = [header[number] for number in columns]
    rate = _common_rate(path, header, special[TIME], list(blocks.values())) if TIME in special else None
    return Recordings(str(path), signals, labels, groups, channels, rate, [repr(name) for name in blocks])


def _numbers(path: Path, header: list[str], columns: list[int], block: list[tuple[int, list[str]]]) -> np.ndarray:
    """A recording's channels, ``(time, channels)`` float32; NaN where a value is missing."""
    signal = np.empty((len(block), len(columns)), dtype=np.float32)
    for step, (line, row) in enumerate(block):
        for place, column in enumerate(columns):
            signal[step, place] = _number(path, line, header[column], row[column])
    return signal


def _number(path: Path, line: int, column: str, field: str) -> float:
    if field.strip().lower() in MISSING:
        return np.nan
    try:
        return float(field)
    except ValueError:
        raise RKMError(f"{path}, line {line}: {field!r} in the column {column!r} is no number") from None


def _one_of(path: Path, header: list[str], column: int, name: str, block: list[tuple[int, list[str]]]) -> str:
    """The class or group that all rows of a recording have."""
    values = {row[column].strip(): line for line, row in block}
    if len(values) > 1 or "" in values:
        line = values.get("", max(values.values()))
        raise RKMError(
            f"{path}, line {line}: recording {name!r} must have one {header[column]} in all of its rows, not "
            f"{' and '.join(repr(value) for value in sorted(values))}"
        )
    return next(iter(values))


def _common_rate(path: Path, header: list[str], column: int, blocks: list[list[tuple[int, list[str]]]]) -> float | None:
    """The sampling rate of all recordings; None if all are of one step."""
    rates = [rate for block in blocks if (rate := _rate(path, header, column, block)) is not None]
    if not rates:
        return None
    if max(rates) - min(rates) > 0.01 * min(rates):
        raise RKMError(f"{path}: recordings of different sampling rates, from {min(rates):g} to {max(rates):g} Hz")
    return round(float(np.median(rates)), 3)


def _rate(path: Path, header: list[str], column: int, block: list[tuple[int, list[str]]]) -> float | None:
    """Samples a second; None for a recording of one step."""
    times = np.array([_number(path, line, header[column], row[column]) for line, row in block])
    steps = np.diff(times)
    if not len(steps):
        return None
    usual = float(np.median(steps))
    if not usual > 0:
        raise RKMError(f"{path}, line {block[0][0]}: the column {TIME!r} must rise, in seconds, within a recording")
    uneven = np.nonzero(~(np.abs(steps - usual) <= 0.1 * usual))[0]
    if len(uneven):
        raise RKMError(
            f"{path}, line {block[int(uneven[0]) + 1][0]}: {steps[uneven[0]]:g} s after the row before, where "
            f"{usual:g} s are usual: resample to even steps first"
        )
    return 1 / usual


def _indexed(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Recordings:
    other = set(header) - {FILE, LABEL, GROUP}
    if other:
        raise RKMError(f"{path} has a column {FILE!r}, so it is an index, and cannot have {', '.join(sorted(other))}")
    parts = [_part(path, line, path.parent / row[header.index(FILE)].strip()) for line, row in rows]
    first = parts[0]
    for part, (line, _) in zip(parts, rows, strict=True):
        if part.channels != first.channels:
            raise RKMError(f"{path}, line {line}: {part.source} has other columns than {first.source}")
        if part.rate is not None and first.rate is not None and abs(part.rate - first.rate) > 0.01 * first.rate:
            raise RKMError(f"{path}, line {line}: {part.source} has another sampling rate than {first.source}")
    names = [repr(row[header.index(FILE)].strip()) for _, row in rows]
    labels = _noted(path, header, rows, LABEL, [part.labels for part in parts])
    groups = _noted(path, header, rows, GROUP, [part.groups for part in parts])
    return Recordings(str(path), [part.signals[0] for part in parts], labels, groups, first.channels, first.rate, names)


def _part(path: Path, line: int, file: Path) -> Recordings:
    """One recording of an index."""
    if not file.is_file():
        raise RKMError(f"{path}, line {line}: no file {file}")
    names, rows = _read(file)
    if RECORDING in names or FILE in names:
        raise RKMError(f"{path}, line {line}: {file} must be a table of one recording")
    return _table(file, names, rows)


def _noted(
    path: Path, header: list[str], rows: list[tuple[int, list[str]]], what: str, inside: list[list[str] | None]
) -> list[str] | None:
    """Classes or groups: the index's column, else those that all of its files have, else None."""
    if what not in header:
        noted = [values[0] for values in inside if values]
        return noted if len(noted) == len(rows) else None
    values = [row[header.index(what)].strip() for _, row in rows]
    if "" in values:
        raise RKMError(f"{path}, line {rows[values.index('')][0]}: no {what}")
    return values
