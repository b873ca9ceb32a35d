"""One of fairseq's commands, run in this process."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import fairseq_rkm


def fairseq_command(name: str, flags: Sequence[object], log: Path, append: bool = False) -> None:
    """Run one of fairseq's commands in this process.

    Args:
        name: of its module in ``fairseq_cli``: ``train``, ``generate``, ...
        flags: the command's arguments.
        log: the file that gets what it writes, to both streams.
        append: after what the file holds.

    Raises:
        SystemExit: the command's own, for a user's mistake.
    """
    fairseq_rkm.register()  # --user-dir does so only where the package has not been imported yet
    command = importlib.import_module(f"fairseq_cli.{name}")
    # fairseq's own format, which fairseq_log.py reads; an import may have set up another before.
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s", datefmt="%Y-%m-%d %H:%M:%S", level="INFO",
        stream=sys.stdout, force=True,
    )  # fmt: skip
    with _output_in(log, "a" if append else "w"), _argv([f"fairseq-{name}", *map(str, flags)]):
        command.cli_main()


@contextlib.contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = saved


@contextlib.contextmanager
def _output_in(log: Path, mode: str) -> Iterator[None]:
    """What this process writes goes to a file, and afterwards where it went before."""
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    with log.open(mode) as file:
        for stream in saved:
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, before in saved.items():
            os.dup2(before, stream)
            os.close(before)
