"""Python must not end a process while threads are still within PyTorch."""

import atexit
import contextlib
import queue
import threading
import time
from collections.abc import Callable

import torch
from fairseq.data import iterators

from fairseq_rkm.fairseq_patches.registry import setting


@setting(
    "atexit",
    why="a run that ends within an epoch leaves a thread preparing batches, and Python's end aborts the process",
    until="fairseq stops the thread",
)
def stop_preparing_batches() -> None:
    """Stop the threads that prepare batches, at Python's end."""
    _at_exit(_stop_threads)


@setting(
    "atexit",
    why="fairseq leaves its process groups to Python's end, at which a thread of gloo's may be killed within PyTorch",
    until="fairseq destroys its process groups",
)
def leave_process_groups() -> None:
    """Leave gloo's groups before Python's end."""
    _at_exit(_leave_groups)


def _at_exit(function: Callable[[], None]) -> None:
    atexit.unregister(function)
    atexit.register(function)


def _stop_threads() -> None:
    """Let each thread finish its batch, though nobody will take it. Leave a thread alone that takes 10 seconds."""
    for thread in threading.enumerate():
        if not isinstance(thread, iterators.BackgroundConsumer):
            continue
        thread._max_len = 0
        stop = time.monotonic() + 10
        while thread.is_alive() and time.monotonic() < stop:
            with contextlib.suppress(queue.Empty):  # make room: the thread waits to hand over a batch
                thread._queue.get(timeout=0.02)


def _leave_groups() -> None:
    """Wait for gloo's threads. Leave NCCL's groups alone: they would wait for processes that may have failed."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
