"""Files of runs and reports: JSON files, written whole or not at all, and pictures, where matplotlib is installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq_rkm.errors import RKMError


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file whole, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    part.replace(path)


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
