"""``--cuda-graphs`` and late readings in two processes on CPUs, with a stand-in for what records graphs.

:mod:`cli.test_two_processes` has the same on two GPUs.
"""

import re

import pytest
import torch

from cli.conftest import SMALL, finish, start
from cli.test_translation import TASK, copies, preprocess, write
from cli.test_two_processes import AVERAGED, assert_close, checkpoint, free_port

STAND_IN = "stand_in_graphs.py"
GENTLE = ["--lr", 0.003, "--adam-eps", "1e-3", "--disable-validation"]
"""Rounding must not grow: differences between one process and two are rounding at the first update."""
STREAMS = [*SMALL, *AVERAGED, *GENTLE, "--ngram", 2, "--cuda-graphs"]


def train(processes: int, *flags: object, poisoned: int = 0) -> list:
    """Train in some processes on the CPU; the result of each. The last one may be poisoned."""
    meeting = [
        "--distributed-world-size", processes, "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
        "--distributed-no-spawn", "--distributed-init-method", f"tcp://localhost:{free_port()}", "--distributed-rank",
    ]  # fmt: skip
    ranks = []
    for rank in range(processes):
        environment = {"POISONED": str(poisoned)} if poisoned and rank == processes - 1 else {}
        ranks.append(start(STAND_IN, *flags, *([*meeting, rank] if processes > 1 else []), **environment))
    return [finish(rank) for rank in ranks]


def succeed(processes: int, *flags: object) -> list[int]:
    """Train, and return for each process how often it replayed a graph."""
    results = train(processes, *flags)
    for result in results:
        assert result.status == 0, result.output[-5000:]
    counts = [re.search(r"^graphs: .*'replayed': (\d+)", result.output, re.M) for result in results]
    return [int(found[1]) if found else 0 for found in counts]


def test_two_processes_replay_the_training_of_one_and_go_on_in_the_middle(data, tmp_path):
    """For 200 updates with variable lengths; one process has padding in the last segment, and cannot replay it."""
    flags = [data, *STREAMS, "--max-update", 200, "--save-interval-updates", 100]
    (alone,) = succeed(1, *flags, "--batch-size", 8, "--save-dir", tmp_path / "one")
    replayed = succeed(2, *flags, "--batch-size", 4, "--save-dir", tmp_path / "two")
    assert replayed[0] > replayed[1] == alone > 150
    assert_close(tmp_path / "one", tmp_path / "two")
    (middle,) = (tmp_path / "two").glob("checkpoint_*_100.pt")
    resumed = tmp_path / "resumed"
    assert min(succeed(2, *flags, "--batch-size", 4, "--restore-file", middle, "--save-dir", resumed)) > 50
    for name, value in checkpoint(tmp_path / "two")["model"].items():
        assert torch.equal(checkpoint(resumed)["model"][name], value), name


def test_a_norm_that_is_not_finite_in_one_process_ends_all_and_changes_no_weights(data, tmp_path):
    flags = [data, *STREAMS, "--batch-size", 4, "--max-update", 200, "--save-interval-updates", 2]
    for result in train(2, *flags, "--save-dir", tmp_path, poisoned=3):
        assert result.status == 1
        assert "Traceback" not in result.output
        assert "error: training has diverged: gradients are not finite" in result.output
    before = torch.load(tmp_path / "checkpoint_1_2.pt", weights_only=True)["model"]
    crashed = torch.load(tmp_path / "crash.pt", weights_only=True)["model"]
    assert not (tmp_path / "checkpoint_1_4.pt").exists()
    for name, value in before.items():
        assert torch.equal(crashed[name], value), name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sentences of some lengths, so that batches of the same shape recur: an odd number of batches."""
    folder = tmp_path_factory.mktemp("pairs")
    short = [pair for pair in copies(600, 1) if len(pair[0].split()) in (2, 5) and "name" not in pair[0]][:66]
    text = write(folder / "text", {"train": short, "valid": short[:4], "test": short[:4]})
    return preprocess(text, folder / "data")


def test_translation_in_two_processes_is_the_same_with_graphs(pairs, tmp_path):
    """The shapes of the two processes' batches differ, and at an epoch's end one of them has a batch less."""
    flags = [
        pairs, *TASK, "--arch", "rkm_tiny", "--criterion", "label_smoothed_cross_entropy",
        "--optimizer", "adamw_average", *GENTLE, "--clip-norm", 0.3, "--batch-size", 6,
        "--required-batch-size-multiple", 1, "--update-freq", 2, "--max-epoch", 6, "--cpu", "--num-workers", 0,
        "--log-format", "json", "--no-epoch-checkpoints",
    ]  # fmt: skip
    assert succeed(2, *flags, "--save-dir", tmp_path / "plain") == [0, 0]
    replayed = succeed(2, *flags, "--cuda-graphs", "--save-dir", tmp_path / "graphs")
    assert min(replayed) > 10
    wanted = checkpoint(tmp_path / "plain")["model"]
    for name, value in checkpoint(tmp_path / "graphs")["model"].items():
        torch.testing.assert_close(value, wanted[name], msg=lambda m, name=name: f"{name}: {m}")
