"""Is a file text in UTF-8? ``python -m fairseq_rkm.data.text_file FILE ...`` reports the first place that is not."""

import codecs
import gzip
import lzma
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fairseq_rkm.errors import RKMError

OPENERS = {".gz": gzip.open, ".xz": lzma.open}
BOM = codecs.BOM_UTF8
CONVERT = "convert the file (iconv -f latin1 -t utf-8 FILE > NEW, if it is Latin-1)"


def decoded(lines: IO[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a file as text, with their ends and without a byte order mark before the first.

    Args:
        lines: a file opened in binary mode.
        name: the file's name, for messages.

    Raises:
        RKMError: the line and the byte that are not UTF-8.
    """
    for number, line in enumerate(lines, 1):
        if number == 1 and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise RKMError(f"{name} is UTF-16, not UTF-8: convert it (iconv -f utf-16 -t utf-8 FILE > NEW)")
        try:
            yield (line.removeprefix(BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            at = error.start + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            raise RKMError(f"{name}, line {number}, byte {at + 1} (0x{line[at]:02x}): not UTF-8; {CONVERT}") from None


def texts(lines: IO[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a file without their ends: LF, CRLF or CR. Arguments and errors are as in :func:`decoded`."""
    for line in decoded(lines, name):
        yield from line.removesuffix("\n").removesuffix("\r").split("\r")


def check(path: Path) -> None:
    """Refuse a file that is not there, is not UTF-8, or begins with a byte order mark.

    Args:
        path: the file; one whose name ends in .gz or .xz is unpacked.

    Raises:
        RKMError: the fault, with the file, line and byte.
    """
    if not path.is_file():
        raise RKMError(f"no file of text at {path}")
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as lines:  # type: ignore[operator]
            start = lines.read(len(BOM))
            lines.seek(0)
            for _ in decoded(lines, str(path)):
                pass
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise RKMError(f"{path} is not compressed as its name says, or is cut off: {error}") from None
    if start == BOM:
        raise RKMError(
            f"{path}, line 1: begins with a byte order mark, which would become part of the first word: take it away "
            "(tail -c +4 FILE > NEW)"
        )


def main(arguments: Sequence[str]) -> None:
    """Check each of the files; leave with status 1 and a sentence at the first fault."""
    try:
        for name in arguments:
            check(Path(name))
    except RKMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
