"""Run several commands at a time, each with all processes that it starts, and end those that take too long."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

FIRST_PORT, CONNECTIONS = 10_000, 32_768
"""The first port to give to runs, and Linux's first port of the range for connections."""


class Ended(NamedTuple):
    """The end of a command.

    Attributes:
        status: the exit status, negative for a signal; None if the command was killed at its time limit.
        output: of the command, stdout and stderr as they came.
        seconds: that it took.
    """

    status: int | None
    output: str
    seconds: float


class _Running(NamedTuple):
    number: int
    process: subprocess.Popen
    output: Path
    start: float


def run_commands(
    commands: Sequence[Sequence[str]], folder: Path, jobs: int, seconds: float, tell: Callable[[int, Ended], None]
) -> None:
    """Run commands until all have ended. An interruption, or SIGTERM, kills those that run.

    Args:
        commands: they begin in this order.
        folder: the commands' output is kept there while they run.
        jobs: the number of commands that run at a time.
        seconds: a command that has not ended after so many is killed, with all processes that it started.
        tell: is called with a command's number, from 0, and its end, as it ends.
    """
    waiting = list(enumerate(commands))
    running: list[_Running] = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, command = waiting.pop(0)
                running.append(_begin(number, command, folder / f"{number}.txt"))
            time.sleep(0.05)
            for run in list(running):
                if ended := _end_of(run, seconds):
                    running.remove(run)
                    tell(run.number, ended)
    finally:
        for run in running:
            _kill(run.process)
        signal.signal(signal.SIGTERM, before)


def _begin(number: int, command: Sequence[str], output: Path) -> _Running:
    """Start a command in a session of its own, which holds all processes that it starts."""
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return _Running(number, process, output, time.monotonic())


def _end_of(run: _Running, limit: float) -> Ended | None:
    """A run's end, at its time limit by force; None while it runs."""
    seconds = time.monotonic() - run.start
    status = run.process.poll()
    if status is None and seconds < limit:
        return None
    _kill(run.process)
    return Ended(status, run.output.read_text(errors="replace"), seconds)


def _kill(process: subprocess.Popen) -> None:
    """End a command and what is left of the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports() -> Iterator[int]:
    """Ports of this machine that nobody listens to, each once.

    A process that is told of a port takes seconds to listen to it. Ports of connections, from which the system would
    choose, may be taken by others until then: these lie below them, and begin at a random one.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        end = CONNECTIONS
    return _free(range(FIRST_PORT, end if end > FIRST_PORT + 1000 else CONNECTIONS))


def _free(ports: range) -> Iterator[int]:
    start = random.randrange(len(ports))
    return (port for port in (*ports[start:], *ports[:start]) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
