"""Files of runs and reports: JSON, tables with captions, and pictures, where matplotlib is installed."""

import json
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq_rkm.errors import RKMError


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    part.replace(path)


WIDTH = 120
"""The column before which prose in documents ends."""

# A line that began with one of these would be a list, a heading, a quotation or a table.
_MARKS = re.compile(r" (?=(?:[-+*>|]|#+|\d+[.)])(?: |$))")


def write_results(out: Path, text: str) -> str:
    """Write ``results.md`` into the folder ``out``: Markdown whose prose ends by column :data:`WIDTH`.

    Returns:
        The text as it is written.
    """
    text = "\n".join(line for long in text.split("\n") for line in _filled(long))
    (out / "results.md").write_text(text, encoding="utf-8")
    return text


def _filled(line: str) -> list[str]:
    """A line of prose as several short ones; rows of tables stay whole."""
    if len(line) <= WIDTH or line.startswith("|"):
        return [line]
    item = "- " if line.startswith("- ") else ""
    words = _MARKS.sub("\0", line.removeprefix(item))
    lines = textwrap.wrap(
        words, WIDTH, initial_indent=item, subsequent_indent=" " * len(item), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\0", " ") for line in lines]


def pyplot() -> Any:
    """``matplotlib.pyplot``, set to draw into files.

    Raises:
        RKMError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise RKMError("pictures are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw(picture: Callable[..., None], *arguments: Any) -> bool:
    """Draw a picture of a report; the report is of use without it.

    Returns:
        Whether it was drawn. Without matplotlib a sentence says so on stderr.
    """
    try:
        picture(*arguments)
    except RKMError as error:
        print(error, file=sys.stderr)
        return False
    return True
