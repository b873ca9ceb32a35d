import re
import subprocess
import sys
from argparse import Namespace

import pytest
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

from fairseq_rkm.experiments import flag_combinations
from fairseq_rkm.experiments.flag_combinations import make_data, outcome_of


def log(*losses):
    return "".join(f'2026-01-01 00:00:00 | INFO | train_inner | {{"loss": "{loss}"}}\n' for loss in losses)


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (0, log(4.5, 4.0), "trains"),
        (0, log(4.5, 4.4), r"fails: the losses are \[4.5\] to \[4.4\]"),
        (0, log(4.5, "nan"), r"fails: the losses are \[4.5\] to \[nan\]"),
        (0, "", r"fails: the losses are \[\] to \[\]"),
        (1, f"{log(4.5)}[rank1]: fairseq-rkm: error: no luck\n", "no luck"),
        (1, "Traceback ...\nfairseq-rkm: error: another rank\nValueError: 3\n\n", "fails: ValueError: 3"),
        (-9, "", "fails: no output"),
    ],
)
def test_what_became_of_a_run(status, output, outcome):
    assert re.fullmatch(outcome, outcome_of(status, output))


def try_all(monkeypatch, *flags):
    """The commands that are started; all runs with bfloat16 are refused, and float32 fails with graphs."""
    commands = []

    def run(command, **_kwargs):
        commands.append(command)
        if "--bf16" in command:
            return Namespace(returncode=1, stdout="fairseq-rkm: error: too short")
        fails = "--cuda-graphs" in command
        return Namespace(returncode=int(fails), stdout="Traceback\nE: 1" if fails else log(3, 1))

    monkeypatch.setattr(flag_combinations, "circumstances", lambda: {"hardware": "a", "torch": "2", "commit": "c"})
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["flag_combinations.py", *flags])
    flag_combinations.main()
    return commands


def test_the_table_has_all_combinations_and_their_sentences(monkeypatch, capsys):
    backends = ["--backends", "legacy_ddp", "c10d"]
    precisions = ["--precisions", "float32 --bf16"]
    commands = try_all(
        monkeypatch, "--device", "cuda", "--models", "rkm_lm", "rkm", *precisions, *backends, "--lr", "1"
    )
    assert len(commands) == 2 * 2 * 2 * 2
    assert all(command[-4:] == ["--lr", "1", "--distributed-world-size", "2"] for command in commands)
    table = capsys.readouterr().out.partition("\n\n")[2]
    assert "| `rkm` | float32 | no | trains | trains |" in table
    assert "| `rkm` | float32 | yes | fails (1) | fails (1) |" in table
    assert "| `rkm_lm` | --bf16 | yes | (2) | (2) |" in table
    assert "\n1. fails: E: 1\n2. too short\n" in table
    assert table.endswith("2 GPUs (a), torch 2, commit c.\n")


def test_on_cpus_there_are_no_graphs(monkeypatch):
    commands = try_all(monkeypatch, "--device", "cpu", "--models", "rkm", "--precisions", "float32")
    assert len(commands) == len(flag_combinations.DIFFERENT)
    assert all(command[-1] == "--cpu" for command in commands)


def test_unknown_precisions_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        try_all(monkeypatch, "--precisions", "--fp8 float32")
    assert "--precisions is of float32, --bf16, --fp16, " in capsys.readouterr().err


def test_the_data_are_a_language_to_learn(tmp_path):
    make_data(tmp_path)
    words = Dictionary.load(str(tmp_path / "dict.txt"))
    stream, source, target = (
        MMapIndexedDataset(str(tmp_path / name)) for name in ("train", "train.xx-yy.xx", "train.xx-yy.yy")
    )
    assert len(stream) == len(source) == len(target) == 600
    for alone, given, wanted in zip(stream, source, target, strict=True):
        assert alone.tolist() == given.tolist()
        assert given.tolist()[:-1] == wanted.tolist()[-2::-1]
        assert given[-1] == wanted[-1] == words.eos()


@pytest.mark.gpu(count=2)
def test_two_gpus_train_or_say_why_not(monkeypatch, capsys):
    """Some combinations; the script tries all, in a quarter of an hour."""
    flags = ["--models", "rkm", "--precisions", "--amp --memory-efficient-bf16", "--backends", "pytorch_ddp"]
    monkeypatch.setattr(sys, "argv", ["flag_combinations.py", *flags])
    flag_combinations.main()
    output = capsys.readouterr().out
    assert "fails" not in output
    assert "| `rkm` | --amp | no | trains |" in output
