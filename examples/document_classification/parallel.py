"""Several tasks at a time, each in a process of its own, shared out over GPUs, until they are done or time is up."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fairseq_rkm import RKMError


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

    A process that has looked at its GPUs cannot be forked into others that use them.

    Returns:
        What ``CUDA_VISIBLE_DEVICES`` was, for :func:`gpus`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
    outcome: Callable[[Path], str],
) -> list[str]:  # fmt: skip
    """Run tasks, a line for each that ends; those still running at the deadline are stopped.

    Args:
        tasks: in the order in which they begin.
        out: a task's output goes to ``out/NAME.log``.
        jobs: how many run at a time.
        devices: shared out among these; several tasks may have the same.
        deadline: as ``time.monotonic()`` counts.
        outcome: what to say of a task that succeeded, from ``out/NAME``.

    Returns:
        The names of those that failed.
    """
    # Forks of this process have its imports, fairseq's five seconds among them.
    context = multiprocessing.get_context("fork")
    waiting, free = list(tasks), [devices[i % len(devices)] for i in range(jobs)]
    running: list[Running] = []
    failed: list[str] = []
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
    return failed


def _call(task: Task, log: Path, gpu: str | None) -> None:
    """Call a task's function with all output in its log and one GPU in sight."""
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
