"""Run several tasks at a time over the GPUs, each in a process of its own, until all are done or time is up.

A task runs fairseq's commands in its own process (``fairseq_command.py``): they end with the task.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fairseq_rkm.errors import RKMError

PROGRESS_SECONDS = 20


def split_command_line(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at ``--``: the part before it, and the part after it, for another command."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


class Task(NamedTuple):
    """A function to call, its arguments, and the name of its log."""

    name: str
    function: Callable[..., None]
    arguments: tuple


class Running(NamedTuple):
    """A task's process, the GPU that it sees, and its start in seconds of ``time.monotonic()``."""

    task: Task
    process: Any
    gpu: str | None
    start: float


def hide_gpus() -> str | None:
    """Hide the GPUs from this process; call it before importing fairseq, which looks at them.

    A process that has looked at its GPUs cannot be forked into processes that use them. PyTorch must not even count
    them with CUDA: CUDA would remember, across forks, that there were none.

    Returns:
        The former value of ``CUDA_VISIBLE_DEVICES``, for :func:`gpus`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    return visible


def gpus(visible: str | None) -> list[str | None]:
    """The values of ``CUDA_VISIBLE_DEVICES`` for tasks, one a GPU; one None on a machine without GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    counted = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    numbers = range(int(counted.stdout))
    return [visible.split(",")[i] if visible else str(i) for i in numbers] or [None]


def share_processors(jobs: int) -> None:
    """Give each of ``jobs`` tasks its share of the processors; a setting in the user's environment stands."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


def not_done(tasks: Sequence[Task], out: Path, result: str, kind: str, jobs: int) -> list[Task]:
    """The tasks without an ``out/NAME/RESULT``; a printed line counts the finished ones."""
    waiting = [task for task in tasks if not (out / task.name / result).is_file()]
    print(f"{len(tasks) - len(waiting)} of {len(tasks)} {kind} are done; {jobs} at a time now", flush=True)
    return waiting


def run_all(
    tasks: Sequence[Task], out: Path, jobs: int, devices: Sequence[str | None], deadline: float,
    outcome: Callable[[Path], str], progress: Callable[[Path], str] | None = None,
) -> list[str]:  # fmt: skip
    """Run tasks until all have ended; at the deadline, stop the running ones.

    A line tells of each task that ends, and every 20 seconds of all that run.

    Args:
        tasks: the tasks; they begin in this order.
        out: a task's output goes to ``out/NAME.log``.
        jobs: the number of tasks that run at a time.
        devices: values of ``CUDA_VISIBLE_DEVICES`` to share out; several tasks may have the same.
        deadline: in seconds of ``time.monotonic()``.
        outcome: makes the words for a finished task from ``out/NAME``.
        progress: makes the words for a running task; an empty text says nothing.

    Returns:
        The names of the failed tasks.
    """
    pool = _Pool(tasks, out, [devices[i % len(devices)] for i in range(jobs)], outcome, progress)
    # SIGTERM ends this process through ``finally``: running tasks are stopped.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while left := len(pool.running) + len(pool.waiting):
            if time.monotonic() > deadline:
                print(f"out of time, {left} not done: the same command goes on", flush=True)
                break
            pool.start()
            time.sleep(0.1)
            pool.tell_progress()
            pool.collect()
    finally:
        pool.stop()
        signal.signal(signal.SIGTERM, before)
    return pool.failed


class _Pool:
    """The state of :func:`run_all`: waiting tasks, running processes and free GPUs."""

    def __init__(
        self, tasks: Sequence[Task], out: Path, devices: list[str | None], outcome: Callable[[Path], str],
        progress: Callable[[Path], str] | None,
    ) -> None:  # fmt: skip
        self.waiting, self.out, self.free, self.outcome, self.progress = list(tasks), out, devices, outcome, progress
        self.count, self.told = len(tasks), time.monotonic()
        self.running: list[Running] = []
        self.failed: list[str] = []
        # A fork has the imports of this process and saves the five seconds of fairseq's.
        self.context = multiprocessing.get_context("fork")

    def start(self) -> None:
        """Begin as many tasks as there are free places."""
        while self.waiting and self.free:
            task, gpu = self.waiting.pop(0), self.free.pop(0)
            process = self.context.Process(target=_call, args=(task, self.out / f"{task.name}.log", gpu))
            process.start()
            self.running.append(Running(task, process, gpu, time.monotonic()))

    def tell_progress(self) -> None:
        """Every 20 seconds, print a line with the state of each running task."""
        if not self.progress or time.monotonic() - self.told <= PROGRESS_SECONDS:
            return
        self.told = time.monotonic()
        states = [(one.task.name, self.progress(self.out / one.task.name)) for one in self.running]
        if told_of := [f"{name} {state}" for name, state in states if state]:
            print("  " + "; ".join(told_of), flush=True)

    def collect(self) -> None:
        """Print a line for each ended task, and free its place."""
        for ended in [one for one in self.running if not one.process.is_alive()]:
            self.running.remove(ended)
            self.free.append(ended.gpu)
            name, status = ended.task.name, ended.process.exitcode
            if status:
                self.failed.append(name)
            said = "failed" if status else self.outcome(self.out / name)
            place = f"[{self.count - len(self.waiting) - len(self.running)}/{self.count}]"
            print(f"{place} {name}: {said}, {time.monotonic() - ended.start:.0f} s", flush=True)

    def stop(self) -> None:
        """Stop all running tasks."""
        for one in self.running:
            one.process.terminate()
            one.process.join()


def run_table(
    tasks: Sequence[Task], result: str, kind: str, out: Path, jobs: int, devices: Sequence[str | None], deadline: float,
    outcome: Callable[[Path], str], progress: Callable[[Path], str],
) -> None:  # fmt: skip
    """Run a table's unfinished tasks: :func:`not_done`, then :func:`run_all`.

    Raises:
        SystemExit: a task failed.
    """
    waiting = not_done(tasks, out, result, kind, jobs)
    exit_if_failed(run_all(waiting, out, jobs, devices, deadline, outcome, progress), out)


def exit_if_failed(failed: Sequence[str], out: Path) -> None:
    """Raise SystemExit with the names and logs of failed tasks, if there are any."""
    if failed:
        sys.exit("failed: " + ", ".join(f"{name} (see {out / name}.log)" for name in failed))


def _call(task: Task, log: Path, gpu: str | None) -> None:
    """Call a task's function; its output goes to the log, and it sees one GPU."""
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
