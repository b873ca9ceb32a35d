"""Labelled documents in CSV files: a row is a class and a text in one or more fields.

Without further word the class is the first field and there is no header, as in the files of Zhang et al. (2015).
"""

import csv
import gzip
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from fairseq_rkm.errors import RKMError

OPENERS: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}
"""Functions that open compressed files, by the end of the file's name."""

NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Characters that Python's ``surrogateescape`` puts in the place of bytes that are not UTF-8."""

LONGEST_CLASS = 1000
"""The most characters of a class. A longer first field is a text."""


class Document(NamedTuple):
    """A row that is a labelled document.

    Attributes:
        line: the row's first line in the file, from 1.
        label: the class.
        text: the text's fields, joined by spaces.
    """

    line: int
    label: str
    text: str


class BrokenRow(NamedTuple):
    """A row that is not a labelled document.

    Attributes:
        line: the row's first line in the file, from 1.
        reason: the fault, for a message.
    """

    line: int
    reason: str


def read_rows(
    path: Path, columns: Sequence[str] | None = None, delimiter: str | None = None
) -> Iterator[Document | BrokenRow]:
    """Yield the rows of a file, without blank lines.

    A text's fields are joined by spaces. Spaces also replace the format's backslash escapes (backslash n for the end of
    a line) and line ends within quotes. Lines may end in any mixture of LF, CRLF and CR.

    >>> list(read_rows(Path("train.csv")))
    [Document(line=1, label='3', text='Wall St. Bears Claw Back Into the Black ...'), ...]

    Args:
        path: a file of UTF-8 text. A name that ends in .xz or .gz means that it is compressed.
        columns: the class's field, then the text's fields: names in the file's first row, or numbers from 1 for a file
            without a header. None: the first field, then all others.
        delimiter: between two fields. None: a tab for .tsv, else a comma.

    Raises:
        RKMError: there is no such file, it is not compressed as its name says, or its header lacks a column.
    """
    if not path.is_file():
        raise RKMError(f"no file of labelled documents at {path}")
    csv.field_size_limit(sys.maxsize)
    try:
        with _open(path) as lines:
            between = delimiter or ("\t" if ".tsv" in path.suffixes else ",")
            reader = csv.reader((line.replace("\0", " ") for line in lines), strict=True, delimiter=between)
            yield from _rows(reader, _places(path, reader, columns) if columns else None)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise RKMError(f"{path} is not compressed as its name says, or is cut off: {error}") from None


def _open(path: Path) -> IO[str]:
    opener = OPENERS.get(path.suffix, open)
    # utf-8-sig: spreadsheets put a byte order mark before the first class.
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _places(path: Path, reader: Iterator[list[str]], columns: Sequence[str]) -> list[int]:
    """Return the places of columns among a row's fields. Names are looked up in the header, which is read."""
    if all(column.isdecimal() and int(column) for column in columns):
        return [int(column) - 1 for column in columns]
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise RKMError(f"{path}: the first line is no header: broken quotes: {error}") from None
    missing = [column for column in columns if header.count(column) != 1]
    if missing:
        raise RKMError(f"{path}: not one column {missing[0]!r} in its first line, whose fields are {header}")
    return [header.index(column) for column in columns]


def _rows(reader: Iterator[list[str]], places: list[int] | None) -> Iterator[Document | BrokenRow]:
    while True:
        line = reader.line_num + 1  # type: ignore[attr-defined]
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BrokenRow(line, f"broken quotes: {error}; a quote within quotes is written twice")
            continue
        if not fields:
            continue
        if places is None:
            yield _row(line, fields)
        elif len(fields) > max(places):
            yield _row(line, [fields[place] for place in places])
        else:
            yield BrokenRow(line, f"{len(fields)} fields: column {max(places) + 1} is asked for")


def _row(line: int, fields: list[str]) -> Document | BrokenRow:
    label, *text = (" ".join(field.replace("\\n", " ").replace("\\", " ").split()) for field in fields)
    if not text:
        return BrokenRow(line, "one field only: a row is a class and a text, separated by a comma (or by --delimiter)")
    if not label:
        return BrokenRow(line, "no class")
    if len(label) > LONGEST_CLASS:
        return BrokenRow(
            line, f"a class of {len(label):,} characters, {label[:20]!r}...: is it the first field? (--columns)"
        )
    joined = " ".join(filter(None, text))
    if NOT_UTF8.search(label) or NOT_UTF8.search(joined):
        return BrokenRow(line, "not UTF-8: convert the file (iconv -f latin1 -t utf-8, say)")
    return Document(line, label, joined)
