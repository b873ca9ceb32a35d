"""fairseq-train with a clock: how long an update spends in its parts.

python -m fairseq_rkm.experiments.timed_training PARTS.json FLAGS...
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.optim import FairseqOptimizer

import fairseq_rkm
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingTask

PARTS = ("passes", "reduction", "optimizer", "host")
"""Parts of an update in their order.

``passes`` is forward and backward, replayed or not. ``reduction`` sums logged numbers and averages gradients over
processes. ``optimizer`` is the norm, clipping and the step. ``host`` is the rest, until the next update's passes:
logging and the next batch. On a GPU these are stretches of its own time. Where the GPU waits for the host, the wait
counts for the part that it waited for.
"""


class UpdateClock:
    """Marks in the time of a device: when each update's parts ended.

    Args:
        on_gpu: whether the time is the current GPU's.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """Note that a part ends now."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def updates(self) -> list[dict[str, float]]:
        """Return the milliseconds of each part of each whole update."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(now) if self.on_gpu else 1000 * (now - before)
            if part == PARTS[0]:
                found.append(dict.fromkeys(PARTS, 0.0))
            if found:
                found[-1][part] += passed
        # The last update has no next one that would end it.
        return found[:-1]


def install(clock: UpdateClock) -> None:
    """Let training mark the ends of its parts."""
    ends: list[tuple[Any, str, Optional[str], str]] = [
        (StatefulLanguageModelingTask, "train_step", PARTS[3], PARTS[0]),
        (FairseqOptimizer, "all_reduce_grads", None, PARTS[1]),
        (StatefulLanguageModelingTask, "optimizer_step", None, PARTS[2]),
    ]
    for owner, name, before, after in ends:
        setattr(owner, name, _marked(getattr(owner, name), clock, before, after))


def _marked(function: Callable, clock: UpdateClock, before: Optional[str], after: str) -> Callable:
    def marked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            clock.mark(before)
        outcome = function(*args, **kwargs)
        clock.mark(after)
        return outcome

    return marked


def main() -> None:
    """Train, and write the parts of all updates to the file that is named first."""
    path, *flags = sys.argv[1:]
    sys.argv = ["fairseq-train", *flags]  # by this name the plugin knows one of fairseq's commands
    from fairseq_cli.train import cli_main

    fairseq_rkm.register()
    clock = UpdateClock(torch.cuda.is_available() and "--cpu" not in flags)
    install(clock)
    cli_main()
    Path(path).write_text(json.dumps(clock.updates()), encoding="utf-8")


if __name__ == "__main__":
    main()
