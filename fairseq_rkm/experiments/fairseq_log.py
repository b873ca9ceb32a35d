"""Read the log that fairseq writes with ``--log-format json``."""

import json
import re
from collections.abc import Iterable
from datetime import datetime


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """The logger's name and the JSON of a line; empty for other lines."""
    found = re.search(r"\| INFO \| (\w+) \| (\{.*\})\s*$", line)
    try:
        return (found[1], json.loads(found[2])) if found else ("", {})
    except json.JSONDecodeError:
        return "", {}


def entries(lines: Iterable[str], kind: str) -> list[dict[str, str]]:
    """The JSON of all lines of one logger: ``train_inner``, ``train``, ``valid``."""
    return [entry for name, entry in map(parse_line, lines) if name == kind]


def time_of(line: str) -> datetime | None:
    """The time of a line; None for a line without one: it continues the line before."""
    stamp = re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?= \|)", line)
    return datetime.fromisoformat(stamp[0]) if stamp else None
