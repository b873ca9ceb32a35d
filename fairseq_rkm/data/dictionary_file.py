"""Check a dictionary's file: does each line hold a symbol and its count, as fairseq-preprocess writes them?"""

from pathlib import Path

from fairseq.data import Dictionary

from fairseq_rkm.data.text_file import BOM, decoded
from fairseq_rkm.errors import RKMError

OVERWRITE = " #fairseq:overwrite"
"""fairseq's mark of a line that may repeat a symbol."""
REMEDY = "restore the file, or write it anew with fairseq-preprocess, and the binarized data with it"


def check_dictionary(path: Path, known: Dictionary) -> None:
    """Check a dictionary's file before fairseq reads it.

    Args:
        path: the file. A file that is not there passes: fairseq reports it.
        known: a dictionary of the symbols that are there already. A line may not repeat them.

    Raises:
        RKMError: a line is not a symbol and a count, repeats a symbol or is not UTF-8; or the file begins with a byte
            order mark.
    """
    if not path.is_file():
        return
    seen = dict.fromkeys(known.symbols, 0)
    with path.open("rb") as raw:
        if raw.read(len(BOM)) == BOM:
            raise RKMError(f"{path}, line 1: begins with a byte order mark, which would be part of a symbol: {REMEDY}")
        raw.seek(0)
        text = "".join(decoded(raw, str(path)))
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        fault = _fault(line, seen, number)
        if fault:
            raise RKMError(f"{path}, line {number}: {fault}; {REMEDY}")


def _fault(line: str, seen: dict[str, int], number: int) -> str | None:
    """Return the fault of a line, or None; take note of its symbol."""
    entry = line.rstrip()
    may_repeat = entry.endswith(OVERWRITE)
    symbol, space, count = entry.removesuffix(OVERWRITE).rpartition(" ")
    if not entry:
        return "is blank, where a symbol and its count should stand"
    if not space and "\t" in entry:
        return f"a tab, where one space should part a symbol from its count: {entry!r}"
    if not _is_count(count) or not space:
        return f"no count after the symbol: {entry!r}"
    if not symbol:
        return f"no symbol before the count: {entry!r}"
    if symbol in seen and not may_repeat:
        where = f"has stood on line {seen[symbol]} before" if seen[symbol] else "is one that fairseq adds by itself"
        return f"the symbol {symbol!r} {where}"
    seen.setdefault(symbol, number)
    return None


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19
