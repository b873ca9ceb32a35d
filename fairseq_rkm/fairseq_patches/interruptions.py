"""A fairseq command that receives a signal to stop says so in a sentence, and ends with the signal's status."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

from fairseq_rkm.fairseq_patches import checkpoint_writing
from fairseq_rkm.fairseq_patches.commands import in_fairseq_command
from fairseq_rkm.fairseq_patches.registry import setting

GRACE = 10.0
"""Seconds for a process to end by itself after a signal. It may be waiting for another process."""

received: list[int] = []
"""The signal that this process received. Empty before."""


@setting(
    "signal",
    why="a command that is interrupted ends in stack traces, and one that is terminated waits for other processes",
    until="fairseq handles SIGINT and SIGTERM",
)
def stop_in_a_sentence() -> None:
    """Handle SIGINT and SIGTERM in fairseq's commands, unless they are handled already, and not in worker processes."""
    if not in_fairseq_command() or threading.current_thread() is not threading.main_thread():
        return
    if multiprocessing.current_process().name != "MainProcess":
        return
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handled = [number for number, default in defaults.items() if signal.getsignal(number) is default]
    if not handled:
        return
    for number in handled:
        signal.signal(number, _stop)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_in_time, args=(reading,), daemon=True).start()
    os.register_at_fork(after_in_child=_be_quiet)


def _stop(number: int, _frame: types.FrameType | None) -> None:
    """Handle a signal: let this process end, or at a second signal end it at once."""
    if received:
        _end(number)
    _tell(number)
    raise SystemExit(128 + number)


def _tell(number: int) -> None:
    received.append(number)
    sys.stdout.flush()
    sentence = f"fairseq-rkm: error: stopped by {signal.Signals(number).name}. {_advice()}\n"
    os.write(2, sentence.encode())  # the signal may have interrupted print


def _advice() -> str:
    if not checkpoint_writing.training_folders:
        return "Its output is not whole: start the same command again"
    last = Path(checkpoint_writing.training_folders[0], "checkpoint_last.pt")
    if last.exists():
        return f"{last} is whole: the same command goes on from it"
    return "No checkpoint had been written: the same command begins anew"


def _end_in_time(reading: int) -> None:
    """End the process if it does not end itself: Python's handlers wait until PyTorch's functions return."""
    while True:
        number = os.read(reading, 1)[0]
        if number in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) is _stop:
            time.sleep(GRACE)
            if not received:
                _tell(number)
            _end(number)


def _end(number: int) -> None:
    """End this process and its worker processes at once."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(128 + number)


def _be_quiet() -> None:
    """Leave it to the main process to end this worker process and to tell the user."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
