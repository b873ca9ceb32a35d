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
        name: the command's module in ``fairseq_cli``: ``train``, ``generate``, ...
        flags: the command's arguments.
        log: the file for the command's output, from both streams.
        append: keep the file's content and write after it.

    Raises:
        SystemExit: the command ends so for a user's mistake.
    """
    fairseq_rkm.register()  # --user-dir registers nothing if the package is imported already
    command = importlib.import_module(f"fairseq_cli.{name}")
    # fairseq_log.py reads fairseq's own format; an import may have set up another.
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
    """Send this process's output to a file, and restore both streams afterwards."""
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
