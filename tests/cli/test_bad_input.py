"""A user's mistake ends a command with one sentence, before training, and a status that is not 0."""

import argparse
import os
import re
import shutil

import pytest
import torch

from cli.conftest import SMALL, TASK, fairseq, hydra_flags, preprocess, succeed, write_text


def train(data, tmp_path, *flags):
    result = fairseq("train", data, *SMALL, *flags, "--save-dir", tmp_path / "run", "--max-update", 1)
    assert "train_inner" not in result.output
    return result


@pytest.mark.parametrize(("flag", "value"), [("--cell", "gru"), ("--backend", "tpu"), ("--ngram-padding", "valid")])
def test_unknown_names(data, tmp_path, flag, value):
    result = train(data, tmp_path, flag, value)
    assert result.status == 2
    assert f"argument {flag}: invalid choice: '{value}' (choose from" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ngram", 0], "--ngram takes a whole number from 1 to 10,000"),
        (["--sigma-i2", 1.5], "--sigma-i2 must lie within (0, 1), not be 1.5"),
        (["--ngram", 3, "--ngram-padding", "same"], "--ngram-padding same looks ahead"),
        (["--decoder-layers", 1], "make --decoder-hidden-size (12) and --decoder-embed-dim (8) equal"),
        (["--update-freq", 2], "--update-freq above 1"),
        (["--batch-size", 2000], "fewer than the 2000 parallel streams"),
        (["--dropout-hidden", 1], "--dropout-hidden must lie within [0, 1), not be 1.0"),
        (
            ["--arch", "lstm_lm", "--decoder-out-embed-dim", 8],
            "LSTMLanguageModel carries no state between segments: use --arch rkm_lm",
        ),
        (
            ["--arch", "rkm"],
            "--task stateful_language_modeling goes with --arch rkm_lm or a preset of it, not with rkm",
        ),
        (["--train-subset", "nowhere"], "no binarized split 'nowhere'"),
        (["--valid-subset", "nowhere"], "no binarized split 'nowhere'"),
    ],
)
def test_flags(data, tmp_path, flags, message):
    assert message in train(data, tmp_path, *flags).error


def test_no_batch_size(data, tmp_path):
    flags = [flag for flag in SMALL if flag not in {"--batch-size", "4"}]
    result = fairseq("train", data, *flags, "--max-tokens", 100, "--save-dir", tmp_path, "--max-update", 1)
    assert "needs --batch-size" in result.error


def test_no_data(tmp_path):
    assert "no dictionary at" in train(tmp_path / "nothing", tmp_path).error


def test_an_empty_split(tmp_path):
    text = write_text(tmp_path)
    (text / "valid.txt").write_text("")
    data = preprocess(text, tmp_path / "bin")
    assert "valid.bin is empty" in train(data, tmp_path).error


def test_a_validation_set_shorter_than_its_streams_is_refused_before_training(tmp_path):
    text = write_text(tmp_path)
    (text / "valid.txt").write_text("w1 w2\n")
    data = preprocess(text, tmp_path / "bin")
    message = "the split 'valid' has 3 tokens, fewer than the 4 parallel streams"
    assert message in train(data, tmp_path).error


@pytest.mark.parametrize("optimizer", ["sgd", "nt_asgd"])
def test_training_that_diverges(data, tmp_path, optimizer):
    flags = [*SMALL, "--optimizer", optimizer, "--lr", 1e20, "--max-update", 20, "--save-dir", tmp_path]
    result = fairseq("train", data, *flags)
    assert "training has diverged" in result.error
    assert "--memory-clip auto (the default" in result.error
    assert "dumping norms" not in result.output
    assert "detected in output" not in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.ngram=0", "ngram must be at least 1, not 0"),
        ("common.seed=-1", "--seed must be at least 0, not -1"),
        ("model._name=rkm_lmm", "unknown model 'rkm_lmm': did you mean rkm_lm"),
        ("model.cell=gru", "configuration key cell: Invalid value 'gru', expected one of [lstm, rkm_lstm,"),
        ("+model.units=3", "configuration key units: Key 'units' not in 'RKMLanguageModelConfig'"),
        ("optimization.lr=[1e20]", "training has diverged"),
    ],
)
def test_mistakes_in_a_configuration_for_hydra(data, tmp_path, change, message):
    result = fairseq("hydra_train", *hydra_flags(data, tmp_path), change)
    assert message in result.error
    assert "dumping norms" not in result.output


def evaluate(data, checkpoint):
    return fairseq("eval_lm", data, *TASK, "--path", checkpoint, "--batch-size", 1, "--cpu").error


def test_another_dictionary(trained, text, tmp_path):
    run, _ = trained
    changed = tmp_path / "text"
    shutil.copytree(text, changed)
    with (changed / "train.txt").open("a") as train_text:
        train_text.write("w29 w29 w29\n" * 50)
    data = preprocess(changed, tmp_path / "bin")
    error = evaluate(data, run / "checkpoint_best.pt")
    assert f"{run}/checkpoint_best.pt was trained with another dictionary than {data}/dict.txt" in error
    result = fairseq(
        "train", data, *SMALL, "--ngram", 2, "--save-dir", tmp_path, "--max-update", 1, "--restore-file",
        run / "checkpoint_best.pt",
    )  # fmt: skip
    assert "trained with another dictionary" in result.error


def test_a_truncated_checkpoint(trained, data, tmp_path):
    run, _ = trained
    whole = (run / "checkpoint_best.pt").read_bytes()
    for size in (len(whole) // 2, 10, 0):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(whole[:size])
        assert f"{cut}" in evaluate(data, cut)
    assert "Model file not found" in evaluate(data, tmp_path / "none.pt")


class Malicious:
    """What unpickling must not run."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Innocent:
    """A class that fairseq does not know."""


@pytest.mark.parametrize("kind", ["malicious", "unknown"])
def test_a_checkpoint_with_another_class_is_refused_by_name_and_nothing_runs(trained, data, tmp_path, kind):
    run, _ = trained
    state = torch.load(run / "checkpoint_best.pt", weights_only=True)
    trace = tmp_path / "it_ran"
    state["extra_state"]["gift"] = Malicious(f"touch {trace}") if kind == "malicious" else Innocent()
    path = tmp_path / "checkpoint.pt"
    torch.save(state, path)
    error = evaluate(data, path)
    assert "refused" in error
    assert ("posix.system" if kind == "malicious" else "Innocent") in error
    result = fairseq("train", data, *SMALL, "--restore-file", path, "--save-dir", tmp_path / "run", "--max-update", 1)
    assert "refused" in result.error
    assert not trace.exists()


def test_a_legacy_checkpoint_with_a_namespace_is_read(trained, data, tmp_path):
    run, _ = trained
    state = torch.load(run / "checkpoint_best.pt", weights_only=True)
    state["extra_state"]["flags"] = argparse.Namespace(lr=1)
    torch.save(state, tmp_path / "checkpoint.pt")
    succeed("eval_lm", data, *TASK, "--path", tmp_path / "checkpoint.pt", "--batch-size", 1, "--cpu")


def test_a_checkpoint_of_another_batch_size_or_number_of_processes(data, tmp_path):
    flags = [*SMALL, "--save-interval-updates", 2]
    succeed("train", data, *flags, "--max-update", 2, "--save-dir", tmp_path)
    result = fairseq("train", data, *flags, "--batch-size", 5, "--max-update", 4, "--save-dir", tmp_path)
    assert "cut otherwise (--batch-size times processes: 4, now 5)" in result.error
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    state["extra_state"]["StatefulLanguageModelingTask"]["ranks"] *= 2
    torch.save(state, tmp_path / "checkpoint_last.pt")
    result = fairseq("train", data, *flags, "--max-update", 4, "--save-dir", tmp_path)
    other = "carries the state of 8 streams (2 processes with --batch-size 4), and now there are 4 (1 with 4)"
    assert f"{other}: give the same product, or begin an epoch anew" in result.error


def test_damaged_data_ends_a_command_before_it_trains_or_scores(data, trained, tmp_path):
    checkpoint = trained[0] / "checkpoint_best.pt"
    bad = shutil.copytree(data, tmp_path / "bad")
    content = bytearray((bad / "test.bin").read_bytes())
    content[7] = 0xFF
    (bad / "test.bin").write_bytes(content)
    (bad / "valid.idx").write_bytes((bad / "valid.idx").read_bytes()[:-5])
    assert "valid.idx is damaged" in train(bad, tmp_path).error
    scored = fairseq("eval_lm", bad, *TASK, "--path", checkpoint, "--batch-size", 1, "--cpu")
    assert re.search(r"test.bin, sentence 1: token 4 is number \d+, and the dictionary has 0 to \d+", scored.error)
    (bad / "dict.txt").write_text("\n" + (bad / "dict.txt").read_text())
    own = ["--user-dir", "fairseq_rkm", "--task", "language_modeling", "--path", checkpoint, "--cpu"]
    assert "dict.txt, line 1: is blank" in fairseq("eval_lm", bad, *own, "--batch-size", 1).error


def test_perplexity_of_words_does_not_depend_on_the_segments_length(trained, data):
    flags = [*TASK, "--path", trained[0] / "checkpoint_best.pt", "--cpu", "--post-process", "sentencepiece"]
    found = {
        re.search(r"Perplexity: ([\d.]+)", succeed("eval_lm", data, *flags, *more).output)[1]
        for more in (["--batch-size", 1, "--tokens-per-sample", 3], ["--batch-size", 1, "--tokens-per-sample", 1000])
    }
    assert len(found) == 1
