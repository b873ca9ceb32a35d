"""Several tasks at a time, each in a process of its own, shared out over GPUs, until they are done or time is up.

What fairseq's commands do, a task does by :func:`fairseq_command`, in its own process: so it ends with the task.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fairseq_rkm
from fairseq_rkm import RKMError

PROGRESS_SECONDS = 20


def split_command_line(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line's own part, and what follows ``--``, which is for another command."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


class Task(NamedTuple):
    """A function to call, and what its log is called."""

    name: str
    function: Callable[..., None]
    arguments: tuple


class Running(NamedTuple):
    """A task's process, the GPU that it has in sight, and when it began."""

    task: Task
    process: Any
    gpu: str | None
    start: float


def hide_gpus() -> str | None:
    """Hide this process's GPUs from itself, before anything is imported that looks at them (fairseq does).

    A process that has looked at its GPUs cannot be forked into others that use them. PyTorch must not even count them
    with CUDA, which would remember, across forks, that there were none.

    Returns:
        What ``CUDA_VISIBLE_DEVICES`` was, for :func:`gpus`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return visible


def gpus(visible: str | None) -> list[str | None]:
    """What ``CUDA_VISIBLE_DEVICES`` may be for a task; one None on a machine without GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    counted = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    numbers = range(int(counted.stdout))
    return [visible.split(",")[i] if visible else str(i) for i in numbers] or [None]


def run_all(
    tasks: Sequence[Task], out: Path, jobs: int, devices: Sequence[str | None], deadline: float,
    outcome: Callable[[Path], str], progress: Callable[[Path], str] | None = None,
) -> list[str]:  # fmt: skip
    """Run tasks, a line for each that ends and now and then one for all; what still runs at the deadline is stopped.

    Args:
        tasks: in the order in which they begin.
        out: a task's output goes to ``out/NAME.log``.
        jobs: how many run at a time.
        devices: shared out among these; several tasks may have the same.
        deadline: as ``time.monotonic()`` counts.
        outcome: what to say of a task that succeeded, from ``out/NAME``.
        progress: what to say of one that runs, every 20 seconds; nothing if empty.

    Returns:
        The names of those that failed.
    """
    # Forks of this process have its imports, fairseq's five seconds among them.
    context = multiprocessing.get_context("fork")
    waiting, free = list(tasks), [devices[i % len(devices)] for i in range(jobs)]
    running: list[Running] = []
    failed: list[str] = []
    told = time.monotonic()
    # To be told to end is to be interrupted: what runs is stopped.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while running or waiting:
            if time.monotonic() > deadline:
                print(f"out of time, {len(running) + len(waiting)} not done: the same command goes on", flush=True)
                break
            while waiting and free:
                task, gpu = waiting.pop(0), free.pop(0)
                process = context.Process(target=_call, args=(task, out / f"{task.name}.log", gpu))
                process.start()
                running.append(Running(task, process, gpu, time.monotonic()))
            time.sleep(0.1)
            if progress and time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                states = [(one.task.name, progress(out / one.task.name)) for one in running]
                if told_of := [f"{name} {state}" for name, state in states if state]:
                    print("  " + "; ".join(told_of), flush=True)
            for ended in [one for one in running if not one.process.is_alive()]:
                running.remove(ended)
                free.append(ended.gpu)
                name, status = ended.task.name, ended.process.exitcode
                if status:
                    failed.append(name)
                said = "failed" if status else outcome(out / name)
                place = f"[{len(tasks) - len(waiting) - len(running)}/{len(tasks)}]"
                print(f"{place} {name}: {said}, {time.monotonic() - ended.start:.0f} s", flush=True)
    finally:
        for one in running:
            one.process.terminate()
            one.process.join()
        signal.signal(signal.SIGTERM, before)
    return failed


def exit_if_failed(failed: Sequence[str], out: Path) -> None:
    """End with a failure, if any of :func:`run_all`'s tasks failed, that names them and their logs."""
    if failed:
        sys.exit("failed: " + ", ".join(f"{name} (see {out / name}.log)" for name in failed))


def _call(task: Task, log: Path, gpu: str | None) -> None:
    """Call a task's function with all output in its log and one GPU in sight."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        task.function(*task.arguments)
    except RKMError as error:
        sys.exit(f"error: {error}")


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
    # fairseq's own format, which report.py reads; an import may have set up another before.
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
