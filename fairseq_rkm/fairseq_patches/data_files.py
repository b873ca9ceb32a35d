"""Binarized data, dictionaries and text to translate are checked as they are read, by every task and command.

fairseq itself reads a damaged file until an index is out of range. That may happen in the middle of training.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fairseq.data import Dictionary, indexed_dataset

from fairseq_rkm.data.dictionary_file import check_dictionary
from fairseq_rkm.data.indexed_check import check_split
from fairseq_rkm.data.text_file import texts
from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch, setting

UNTIL = "fairseq checks what it reads"


@patch(
    indexed_dataset,
    "make_dataset",
    why="damaged data, or data of another dictionary, ends in a stack trace, some of it in the midst of training",
    until=UNTIL,
)
def check_data(make_dataset: Callable) -> Callable:
    """Make ``make_dataset`` check a split's files before it opens them."""

    def checked(path: str, impl: str, fix_lua_indexing: bool = False, dictionary: Dictionary | None = None) -> Any:
        check_split(path, dictionary, impl)
        return make_dataset(path, impl, fix_lua_indexing, dictionary)

    return checked


@patch(
    Dictionary,
    "add_from_file",
    why="a line that is no symbol and count ends in a stack trace, and a byte order mark becomes part of a symbol",
    until=UNTIL,
)
def check_dictionary_file(add_from_file: Callable) -> Callable:
    """Make ``add_from_file`` check a dictionary's lines before it reads them."""

    def checked(self: Dictionary, f: Any) -> None:
        # Some of fairseq's dictionaries begin with lines of their own.
        if isinstance(f, str) and type(self)._load_meta is Dictionary._load_meta:
            check_dictionary(Path(f), self)
        add_from_file(self, f)

    return checked


@setting(
    "fairseq_cli.interactive.buffered_read",
    why="a byte order mark becomes part of the first word, and text that is not UTF-8 ends in a stack trace",
    until=UNTIL,
)
def read_text_to_translate() -> None:
    """Put :func:`buffered_read` in its place in the running command, under either of the command's names."""
    for name in ("fairseq_cli.interactive", "__main__"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "buffered_read") and hasattr(module, "make_batches"):
            module.buffered_read = buffered_read  # type: ignore[attr-defined]


def buffered_read(input: str, buffer_size: int) -> Iterator[list[str]]:  # noqa: A002
    """Read lines for fairseq-interactive, a limited number at a time, without space around them.

    Args:
        input: a file; ``-`` is standard input.
        buffer_size: the most lines at a time.

    Yields:
        Lists of 1 to ``buffer_size`` lines.

    Raises:
        RKMError: there is no such file, or a line is not UTF-8.
    """
    buffer = []
    with _opened(input) as lines:
        for line in texts(lines, "standard input" if input == "-" else input):
            buffer.append(line.strip())
            if len(buffer) >= buffer_size:
                yield buffer
                buffer = []
    if buffer:
        yield buffer


def _opened(path: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    if not os.path.isfile(path):
        raise RKMError(f"no file of text at {path}")
    return open(path, "rb")
