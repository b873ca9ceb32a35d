"""The AWD-LSTM recipe through fairseq's commands, small."""

import re

import pytest
import torch

from cli.conftest import ROOT, TASK, fairseq, succeed
from fairseq_rkm.experiments.language_model_report import read_log

RECIPE = [
    *TASK, "--arch", "rkm_lm_ptb", "--decoder-embed-dim", 8, "--decoder-hidden-size", 12, "--dropout", 0.1,
    "--dropout-input", 0.1, "--dropout-hidden", 0.1, "--layer-norm", "--variable-bptt", "--tokens-per-sample", 12,
    "--batch-size", 4, "--criterion", "cross_entropy_ar_tar", "--clip-norm", 0.25, "--cpu", "--num-workers", 0,
    "--log-format", "json", "--log-interval", 1, "--no-epoch-checkpoints",
]  # fmt: skip
SGD = ["--optimizer", "nt_asgd", "--lr", 20, "--weight-decay", 1.2e-6, "--non-monotone-window", 1]
ADAMW = [
    "--optimizer", "adamw_average", "--adam-betas", "(0.8, 0.99)", "--weight-decay", 0.1, "--lr", 0.02,
    "--lr-scheduler", "cosine", "--warmup-updates", 2, "--max-update", 12, "--no-lr-rescaling",
    "--average-last", 0.5, "--average-decay", 0.9,
]  # fmt: skip


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def progress(path) -> dict:
    return load(path)["last_optimizer_state"]["param_groups"][0]


def loss(result) -> float:
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", result.output)[1])


def test_the_published_recipe_learns_and_its_best_checkpoint_is_what_the_log_says(data, tmp_path):
    flags = [*RECIPE, *SGD, "--max-epoch", 6, "--batch-size-valid", 3]
    result = succeed("train", data, *flags, "--save-dir", tmp_path)
    losses = [float(entry["valid_loss"]) for entry in result.entries("valid")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert "weights are averaged from update" in result.output
    last = progress(tmp_path / "checkpoint_last.pt")
    assert last["average_is_in"]
    assert 0 < last["averaged_updates"] < last["updates"]
    assert last["validation_losses"] == pytest.approx(losses, abs=6e-4)
    first = result.entries("train_inner")[0]
    assert float(first["ar"]) > 0
    assert float(first["loss"]) > float(first["nll_loss"])
    scored = succeed("eval_lm", data, *TASK, "--path", tmp_path / "checkpoint_best.pt", "--batch-size", 3, "--cpu",
                     "--gen-subset", "valid")  # fmt: skip
    assert loss(scored) == pytest.approx(min(losses), abs=6e-4)


@pytest.mark.parametrize(("flags", "before", "within"), [([*SGD, "--max-update", 40], 6, 36), (ADAMW, 3, 9)])
def test_a_run_resumed_before_and_within_averaging_is_the_same_run(data, tmp_path, flags, before, within):
    step = 3
    common = [*RECIPE, *flags, "--save-interval-updates", step]
    succeed("train", data, *common, "--save-dir", tmp_path / "whole")
    whole = load(tmp_path / "whole/checkpoint_last.pt")
    for updates, averaging in ((before, False), (within, True)):
        (saved,) = (tmp_path / "whole").glob(f"checkpoint_*_{updates}.pt")
        assert progress(saved)["averaging"] is averaging
        folder = tmp_path / str(updates)
        succeed("train", data, *common, "--restore-file", saved, "--save-dir", folder)
        resumed = load(folder / "checkpoint_last.pt")
        assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())
        kept = whole["last_optimizer_state"]["state"]
        for index, values in resumed["last_optimizer_state"]["state"].items():
            assert torch.equal(values["average"], kept[index]["average"])
        assert progress(folder / "checkpoint_last.pt") == progress(tmp_path / "whole/checkpoint_last.pt")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
def test_a_run_of_replayed_steps_is_the_same_run_and_resumes(data, tmp_path, precision):
    on_gpu = [flag for flag in RECIPE if flag != "--cpu"]
    flags = [*on_gpu, *ADAMW, *precision, "--max-update", 60, "--save-interval-updates", 45]
    results = [
        succeed("train", data, *flags, *graphs, "--save-dir", tmp_path / name)
        for name, graphs in (("plain", []), ("graphs", ["--cuda-graphs"]))
    ]
    plain, replayed = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("plain", "graphs"))
    assert all(torch.equal(replayed[name], value) for name, value in plain.items())
    logged = [[(e["num_updates"], e["loss"], e["gnorm"]) for e in r.entries("train_inner")] for r in results]
    assert logged[0] == logged[1]
    if not precision:  # fairseq rounds a resumed run's half-precision weights once
        (saved,) = (tmp_path / "graphs").glob("checkpoint_*_45.pt")
        succeed("train", data, *flags, "--cuda-graphs", "--restore-file", saved, "--save-dir", tmp_path / "resumed")
        resumed = load(tmp_path / "resumed/checkpoint_last.pt")["model"]
        assert all(torch.equal(resumed[name], value) for name, value in plain.items())


def hydra(config, data, run, *changes, program="hydra_train"):
    return succeed(
        program, "--config-dir", ROOT / "examples/language_model/config", "--config-name", config,
        f"common.user_dir={ROOT / 'fairseq_rkm'}", f"task.data={data}", f"checkpoint.save_dir={run}",
        f"hydra.run.dir={run / 'hydra'}", "common.cpu=true", "common.log_interval=1", "+model.decoder_embed_dim=8",
        "dataset.batch_size=4", "dataset.batch_size_valid=2", *changes,
    )  # fmt: skip


def test_the_fast_configuration_in_bfloat16_saves_the_average_it_validated(data, tmp_path):
    result = hydra("ptb_fast", data, tmp_path, "common.bf16=true", "+model.decoder_hidden_size=12",
                   "optimization.max_update=10", "lr_scheduler.warmup_updates=2")  # fmt: skip
    state = load(tmp_path / "checkpoint_last.pt")
    group = state["last_optimizer_state"]["param_groups"][0]
    assert (group["updates"], group["averaged_updates"], group["average_is_in"]) == (10, 4, True)
    assert group["betas"] == (0.8, 0.99)
    weights = [value for name, value in state["model"].items() if "fingerprint" not in name]
    assert all(torch.equal(value, value.bfloat16().to(value.dtype)) for value in weights)
    scored = succeed("eval_lm", data, *TASK, "--path", tmp_path / "checkpoint_best.pt", "--batch-size", 2, "--cpu",
                     "--gen-subset", "valid")  # fmt: skip
    assert loss(scored) == pytest.approx(float(result.entries("valid")[-1]["valid_loss"]), rel=5e-3)


def test_the_log_of_two_processes_has_times(data, tmp_path):
    result = hydra("ptb_fast", data, tmp_path, "+model.decoder_hidden_size=12", "optimization.max_update=2",
                   "lr_scheduler.warmup_updates=1", "distributed_training.distributed_world_size=2",
                   program="fairseq_rkm.hydra_train")  # fmt: skip
    training, _, seconds = read_log(result.output)
    assert [entry["num_updates"] for entry in training] == ["1", "2"]
    assert seconds > 0


def test_the_wikitext103_configuration_trains_with_its_adaptive_softmax(data, tmp_path):
    result = hydra("wikitext103", data, tmp_path, "+model.decoder_hidden_size=64", "optimization.max_update=1",
                   '+model.adaptive_softmax_cutoff="8,16"')  # fmt: skip
    (entry,) = result.entries("train_inner")
    assert 3 < float(entry["nll_loss"]) < 7
    assert "adaptive_softmax" in "".join(load(tmp_path / "checkpoint_last.pt")["model"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", -1], "--alpha must be at least 0, not -1.0"),
        (["--non-monotone-window", 0], "--non-monotone-window must be at least 1, not 0"),
        (["--dropout-weights", 1], "--dropout-weights must lie within [0, 1), not be 1.0"),
        (["--cuda-graphs"], "--cuda-graphs needs a CUDA GPU (and no --cpu)"),
        (["--adaptive-softmax-cutoff", "8"], "--share-decoder-input-output-embed and --adaptive-softmax-cutoff"),
    ],
)
def test_bad_flags_end_before_training(data, tmp_path, flags, message):
    result = fairseq("train", data, *RECIPE, *SGD, *flags, "--max-update", 1, "--save-dir", tmp_path)
    assert message in result.error
    assert "train_inner" not in result.output


def test_a_task_that_would_not_validate_the_average_is_refused(data, tmp_path):
    result = fairseq(
        "train", data, "--user-dir", "fairseq_rkm", "--task", "language_modeling", "--arch", "rkm_lm", *SGD,
        "--batch-size", 4, "--tokens-per-sample", 12, "--cpu", "--num-workers", 0, "--save-dir", tmp_path,
    )  # fmt: skip
    assert "--task language_modeling does not validate the average" in result.error
