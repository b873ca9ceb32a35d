import socket
import time

import pytest
import torch

from cli.conftest import SMALL, fairseq, finish, start, succeed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def two_processes(data, run, *flags):
    """Train with two gloo processes; rank 0's result."""
    port = free_port()
    common = [
        "--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
        "--distributed-no-spawn", "--distributed-init-method", f"tcp://localhost:{port}",
    ]  # fmt: skip
    ranks = [start("train", data, *SMALL, *flags, *common, "--distributed-rank", r, "--save-dir", run) for r in (0, 1)]
    results = [finish(process) for process in ranks]
    for result in results:
        assert result.status == 0, result.output[-5000:]
    return results[0]


def checkpoint(run) -> dict:
    return torch.load(run / "checkpoint_last.pt", weights_only=True)


PLAIN = ["--optimizer", "adam"]
AVERAGED = [
    "--variable-bptt", "--criterion", "cross_entropy_ar_tar", "--optimizer", "adamw_average", "--average-last", 0.5,
    "--partial-shuffle", "--overlap", 3, "--past-decode", 0.1, "--ngram", "2,1",
]  # fmt: skip


def assert_close(one, other) -> None:
    """The weights of two runs' last checkpoints are the same but for rounding."""
    checkpoints = [checkpoint(run) for run in (one, other)]
    weights = [{**state["model"], **(state["criterion"] or {})} for state in checkpoints]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recipe", [PLAIN, AVERAGED], ids=["plain", "averaged"])
def test_two_processes_train_as_one_with_the_same_global_batch(data, tmp_path, recipe):
    """And either goes on from the other's checkpoint in the middle of an epoch."""
    flags = ["--max-update", 8, "--save-interval-updates", 4, "--ngram", 2, *recipe, "--adam-eps", "1e-4"]
    one = succeed("train", data, *SMALL, *flags, "--batch-size", 8, "--save-dir", tmp_path / "one")
    two = two_processes(data, tmp_path / "two", *flags, "--batch-size", 4)
    for key in ("loss", "gnorm"):
        values = [[float(entry[key]) for entry in result.entries("train_inner")] for result in (one, two)]
        assert len(values[0]) == 8
        assert values[1] == pytest.approx(values[0], rel=2e-3), "as printed, to three decimals"
    assert_close(tmp_path / "one", tmp_path / "two")
    from_, to = ("two", "one") if recipe is PLAIN else ("one", "two")
    middle = ["--restore-file", tmp_path / from_ / "checkpoint_1_4.pt"]
    if to == "one":
        resumed = succeed("train", data, *SMALL, *flags, *middle, "--batch-size", 8, "--save-dir", tmp_path / "other")
    else:
        resumed = two_processes(data, tmp_path / "other", *flags, *middle, "--batch-size", 4)
    assert len(resumed.entries("train_inner")) == 4
    assert_close(tmp_path / from_, tmp_path / "other")


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_two_gpus_train_as_one_with_the_same_global_batch(data, tmp_path, backend):
    flags = [*(flag for flag in SMALL if flag != "--cpu"), "--max-update", 8, "--ngram", 2, "--adam-eps", "1e-4"]
    one = succeed("train", data, *flags, "--batch-size", 8, "--save-dir", tmp_path / "a")
    both = ["--ddp-backend", backend, "--batch-size", 4, "--save-dir", tmp_path / "b"]
    two = succeed("train", data, *flags, *both, gpus=2)
    assert "distributed init (rank 1)" in two.output
    losses = [[float(entry["loss"]) for entry in result.entries("train_inner")] for result in (one, two)]
    assert len(losses[0]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


ON_TWO_GPUS = [
    *(flag for flag in SMALL if flag != "--cpu"), *AVERAGED, "--ngram", 2, "--dropout", 0.2, "--max-update", 60,
    "--save-interval-updates", 30, "--batch-size", 4,
]  # fmt: skip


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
def test_two_gpus_replay_the_same_training_and_go_on_with_it(data, tmp_path, precision):
    """With either backend; the runs without graphs take the one that averages gradients in the same way."""
    runs = {
        name: succeed("train", data, *ON_TWO_GPUS, *precision, *flags, "--save-dir", tmp_path / name, gpus=2)
        for name, flags in {
            "plain": ["--ddp-backend", "legacy_ddp"],
            "legacy": ["--ddp-backend", "no_c10d", "--cuda-graphs"],
            "pytorch": ["--ddp-backend", "pytorch_ddp", "--cuda-graphs"],
        }.items()
    }
    assert "--cuda-graphs averages gradients after the replay: --ddp-backend legacy_ddp" in runs["pytorch"].output
    logged = [[(e["loss"], e["gnorm"]) for e in run.entries("train_inner")] for run in runs.values()]
    assert len(logged[0]) == 60
    assert logged[1] == logged[2] == logged[0]
    wanted = checkpoint(tmp_path / "plain")["model"]
    for name in ("legacy", "pytorch"):
        given = checkpoint(tmp_path / name)["model"]
        assert all(torch.equal(given[key], value) for key, value in wanted.items()), name
    if not precision:  # fairseq rounds a resumed run's half-precision weights once
        (saved,) = (tmp_path / "legacy").glob("checkpoint_*_30.pt")
        flags = ["--cuda-graphs", "--restore-file", saved, "--save-dir", tmp_path / "resumed"]
        succeed("train", data, *ON_TWO_GPUS, *flags, gpus=2)
        given = checkpoint(tmp_path / "resumed")["model"]
        assert all(torch.equal(given[key], value) for key, value in wanted.items())


@pytest.mark.gpu(count=2)
def test_two_gpus_replay_as_one_with_the_same_global_batch(data, tmp_path):
    flags = [*(flag for flag in SMALL if flag != "--cpu"), *AVERAGED, "--max-update", 20, "--adam-eps", "1e-4"]
    one = succeed("train", data, *flags, "--batch-size", 8, "--cuda-graphs", "--save-dir", tmp_path / "a")
    two = succeed("train", data, *flags, "--batch-size", 4, "--cuda-graphs", "--save-dir", tmp_path / "b", gpus=2)
    losses = [[float(entry["loss"]) for entry in result.entries("train_inner")] for result in (one, two)]
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("flags", [["--optimizer", "adam"], AVERAGED], ids=["at_once", "late"])
def test_two_gpus_end_a_run_that_diverges(data, tmp_path, flags):
    common = [*(flag for flag in SMALL if flag != "--cpu"), *flags, "--lr", "1e30", "--clip-norm", 0]
    common += ["--max-update", 60, "--memory-clip", "none", "--save-dir", tmp_path]
    result = fairseq("train", data, *common, gpus=2)
    assert result.error.startswith("training has diverged")


@pytest.mark.parametrize("all_ranks", [[], ["--load-checkpoint-on-all-dp-ranks"]])
def test_two_processes_resume_exactly(data, tmp_path, all_ranks):
    flags = ["--save-interval-updates", 3, "--dropout", 0.2, *all_ranks]
    two_processes(data, tmp_path / "whole", *flags, "--max-update", 6)
    two_processes(data, tmp_path / "parts", *flags, "--max-update", 3)
    carried = checkpoint(tmp_path / "parts")["extra_state"]["StatefulLanguageModelingTask"]["ranks"]
    assert len(carried) == 2
    assert not torch.equal(*carried)
    two_processes(data, tmp_path / "parts", *flags, "--max-update", 6)
    whole, parts = (checkpoint(tmp_path / name)["model"] for name in ("whole", "parts"))
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name


def test_processes_of_torchrun_on_cpus_are_one_run_and_name_the_one_that_is_killed(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = [*SMALL, "--max-epoch", 100_000, "--save-interval-updates", 20, "--log-interval", 1000]
    ranks = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        ranks.append(start("train", data, *flags, "--disable-validation", "--save-dir", tmp_path))
    while not (tmp_path / "checkpoint_1_20.pt").exists():
        assert ranks[0].poll() is None
        time.sleep(0.1)
    ranks[1].kill()
    result = finish(ranks[0])
    finish(ranks[1])
    assert result.status == 1
    assert "Traceback" not in result.output
    assert "rank 0 lost rank 1 " in result.output.splitlines()[-1]
    state = checkpoint(tmp_path)
    assert len(state["extra_state"]["StatefulLanguageModelingTask"]["ranks"]) == 2


def test_a_number_of_processes_is_enough_on_cpus(data, tmp_path):
    succeed("train", data, *SMALL, "--max-update", 2, "--distributed-world-size", 2, "--save-dir", tmp_path)
    assert len(checkpoint(tmp_path)["extra_state"]["StatefulLanguageModelingTask"]["ranks"]) == 2
