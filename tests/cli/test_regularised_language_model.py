"""All regularisers of language models together, through fairseq's commands, small."""

import re

import pytest
import torch

from cli.conftest import TASK, fairseq, succeed

REGULARISED = [
    "--arch", "rkm_lm_ptb_no_feedback_fast", "--decoder-embed-dim", 8, "--decoder-hidden-size", 12,
    "--skip-connections", "--softmaxes", 2, "--dropout-latent", 0.05, "--tokens-per-sample", 12, "--variable-bptt",
    "--no-lr-rescaling", "--partial-shuffle", "--overlap", 3, "--criterion", "cross_entropy_ar_tar", "--past-decode",
    0.01, "--optimizer", "adamw_average", "--adam-betas", "(0.8, 0.99)", "--weight-decay", 0.1, "--lr", 0.03,
    "--clip-norm", 0.25,
]  # fmt: skip
ALONE = [
    *TASK, *REGULARISED, "--batch-size", 8, "--cpu", "--num-workers", 0, "--log-format", "json", "--log-interval", 1,
    "--no-epoch-checkpoints",
]  # fmt: skip
"""A number of streams that has no factor 3."""
AVERAGED = ["--average-last", 0.5, "--average-decay", 0.9, "--max-update", 133]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two epochs, its folder and what it printed."""
    run = tmp_path_factory.mktemp("regularised")
    flags = [*ALONE, *AVERAGED, "--max-epoch", 2, "--save-interval-updates", 50, "--save-dir", run]
    return run, succeed("train", data, *flags, "--valid-subset", "valid,train")


def test_two_epochs_learn_and_evaluation_is_of_the_text_in_order_and_once(data, whole):
    run, result = whole
    losses = [float(entry["valid_loss"]) for entry in result.entries("valid")]
    assert losses[-1] < losses[0]
    first, *_, last = result.entries("train_inner")
    for name in ("past_nll", "ar", "tar"):
        assert float(first[name]) > 0
    assert float(first["past_nll"]) == pytest.approx(5, abs=0.5), "at first, of 33 words"
    assert float(last["past_nll"]) < float(first["past_nll"])
    assert float(first["loss"]) > float(first["nll_loss"])
    assert not any(key.endswith("past_nll") for key in result.entries("valid")[0])
    saved = load(run / "checkpoint_last.pt")
    assert saved["criterion"]["past.bias"].any()
    assert saved["cfg"]["model"]["ngram"] == [2, 1, 1, 1]
    # The training set, validated while training, is the training set as it is scored by itself.
    scored = succeed("eval_lm", data, *TASK, "--path", run / "checkpoint_last.pt", "--batch-size", 8, "--cpu",
                     "--gen-subset", "train")  # fmt: skip
    validated = [entry["train_loss"] for entry in result.entries("train") if "train_wall" not in entry]
    assert len(validated) == len(losses)
    assert float(re.search(r"Loss \(base 2\): ([\d.]+)", scored.output)[1]) == pytest.approx(
        float(validated[-1]), abs=1e-3
    )


def test_a_run_that_is_resumed_in_the_middle_is_the_same_run(data, whole, tmp_path):
    run, _ = whole
    succeed("train", data, *ALONE, *AVERAGED, "--max-epoch", 2, "--restore-file", run / "checkpoint_1_50.pt",
            "--save-dir", tmp_path)  # fmt: skip
    kept, resumed = load(run / "checkpoint_last.pt"), load(tmp_path / "checkpoint_last.pt")
    for part in ("model", "criterion"):
        assert all(torch.equal(resumed[part][name], value) for name, value in kept[part].items()), part
    assert kept["optimizer_history"][-1]["num_updates"] == resumed["optimizer_history"][-1]["num_updates"]


def test_a_run_goes_on_without_past_decoding_only_if_it_is_told_so(data, whole, tmp_path):
    run, _ = whole
    flags = [*ALONE, "--past-decode", 0, "--restore-file", run / "checkpoint_1_50.pt", "--max-update", 51]
    result = fairseq("train", data, *flags, "--save-dir", tmp_path)
    assert "(--past-decode has a bias to train), or --reset-optimizer" in result.error
    succeed("train", data, *flags, "--reset-optimizer", "--save-dir", tmp_path)
    assert load(tmp_path / "checkpoint_last.pt")["criterion"] is None
