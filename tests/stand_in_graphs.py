"""fairseq-train on a CPU as on a GPU: a stand-in records graphs, and numbers are read late. Flags are fairseq-train's.

At the end it prints how many graphs were recorded and how often graphs were replayed. With ``POISONED=N`` in the
environment, the gradients of this process alone have no finite norm at update N, counted from 1.
"""

import atexit
import os
import sys
from collections import Counter

import torch

import fairseq_rkm
from fairseq_rkm.fairseq_patches import late_readings
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.models.translation import rkm_model
from fairseq_rkm.optim.averaging import AveragingOptimizer
from fairseq_rkm.tasks import graphed_steps

counts: Counter = Counter()


def record(run, _pool):
    """To replay is to run again, from the same tensors to the same tensors; a recording draws no random numbers."""
    with torch.random.fork_rng():
        run()
    counts["recorded"] += 1

    def replay():
        counts["replayed"] += 1
        run()

    return replay


def poison(update: int) -> None:
    """Let the norm of an update be infinite in this process."""
    clip, calls = AveragingOptimizer.clip_grad_norm, Counter()

    def poisoned(optimizer, *args, **kwargs):
        calls["updates"] += 1
        norm = clip(optimizer, *args, **kwargs)
        return norm + torch.inf if calls["updates"] == update else norm

    AveragingOptimizer.clip_grad_norm = poisoned


def main() -> None:
    from fairseq_cli.train import cli_main

    sys.argv[0] = "fairseq-train"  # mistakes end in a sentence
    fairseq_rkm.register()
    graphed_steps.StepGraphs.__init__.__defaults__ = (record,)
    GraphedFunction.__init__.__defaults__ = (record, "")
    graphed_steps.check_graphs = lambda _args, _model: None
    rkm_model.check_graphs = lambda _tokens: None
    late_readings._is_on_gpu = lambda _tensor: True
    if "POISONED" in os.environ:
        poison(int(os.environ["POISONED"]))
    atexit.register(lambda: print(f"graphs: {dict(counts)}", flush=True))
    cli_main()


if __name__ == "__main__":
    main()
