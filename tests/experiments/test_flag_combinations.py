import json
import os
import re
import sys

import pytest
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset

from fairseq_rkm.experiments import flag_combinations
from fairseq_rkm.experiments.command_pool import run_commands
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
        (None, log(4.5, 4.0), "fails: no end within 7 s"),
    ],
)
def test_what_became_of_a_run(status, output, outcome):
    assert re.fullmatch(outcome, outcome_of(status, output, 7))


STAND_IN = """
import sys, time
log, *flags = sys.argv[1:]
if "--fp16" in flags:
    time.sleep(60)
if "--bf16" in flags:
    sys.exit("fairseq-rkm: error: too short")
if "--cuda-graphs" in flags:
    time.sleep(0.3)
    sys.exit("Traceback\\nE: 1")
print(log)
"""


def try_all(monkeypatch, *flags):
    """The flags of the started commands; all runs with bfloat16 are refused, and float32 fails with graphs."""
    commands = []
    original = flag_combinations.command

    def command(*args):
        commands.append(original(*args)[3:])
        return [sys.executable, "-c", STAND_IN, log(3, 1), *commands[-1]]

    monkeypatch.setattr(flag_combinations, "circumstances", lambda: {"hardware": "a", "torch": "2", "commit": "c"})
    monkeypatch.setattr(flag_combinations, "command", command)
    monkeypatch.setattr(sys, "argv", ["flag_combinations.py", *flags])
    flag_combinations.main()
    return commands


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What the script sets and removes for its runs is undone."""
    for name in ("OMP_NUM_THREADS", "MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_NODELIST"):
        monkeypatch.setenv(name, "1")


def after(command, flag):
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("jobs", ["1", "5"])
def test_the_table_has_all_combinations_and_their_sentences(monkeypatch, capsys, tmp_path, jobs):
    flags = ["--backends", "legacy_ddp", "c10d", "--precisions", "float32 --bf16", "--lr", "1", "--jobs", jobs]
    json_file = tmp_path / "outcomes.json"
    commands = try_all(monkeypatch, "--device", "cuda", "--models", "rkm_lm", "rkm", *flags, "--json", str(json_file))
    assert len(commands) == 2 * 2 * 2 * 2
    assert all(after(command, "--distributed-world-size") == "2" and "--cpu" not in command for command in commands)
    assert all("--lr 1 --distributed-port" in " ".join(command) for command in commands)
    for flag in ("--distributed-port", "--save-dir"):
        assert len({after(command, flag) for command in commands}) == len(commands)
    progress, _, table = capsys.readouterr().out.partition("\n\n")
    assert [line.split("]")[0] for line in progress.splitlines()] == [f"[{i}/16" for i in range(1, 17)]
    assert "| `rkm` | float32 | no | trains | trains |" in table
    assert "| `rkm` | float32 | yes | fails (1) | fails (1) |" in table
    assert "| `rkm_lm` | --bf16 | yes | (2) | (2) |" in table
    assert "\n1. fails: E: 1\n2. too short\n" in table
    assert table.endswith("2 GPUs (a), torch 2, commit c.\n")
    kept = json.loads(json_file.read_text())
    assert kept["commit"] == "c"
    assert [run["outcome"] for run in kept["runs"]] == [*["trains", "fails: E: 1"] * 2, *["too short"] * 4] * 2
    assert ["output" in run for run in kept["runs"]] == [run["outcome"].startswith("fails") for run in kept["runs"]]


def test_on_cpus_there_are_no_graphs(monkeypatch):
    commands = try_all(monkeypatch, "--device", "cpu", "--models", "rkm", "--precisions", "float32")
    assert len(commands) == len(flag_combinations.DIFFERENT)
    assert all(command[-1] == "--cpu" for command in commands)


def test_a_run_without_an_end_is_killed_and_told(monkeypatch, capsys):
    flags = ["--models", "rkm", "--precisions", "--fp16 float32", "--backends", "no_c10d", "--jobs", "2"]
    try_all(monkeypatch, "--device", "cpu", *flags, "--seconds", "2")
    output = capsys.readouterr().out
    assert "[1/2] rkm --ddp-backend no_c10d: trains, " in output
    assert "[2/2] rkm --fp16 --ddp-backend no_c10d: fails: no end within 2 s, 2 s\n" in output
    assert "| `rkm` | --fp16 | no | fails (1) |" in output


def test_an_interruption_leaves_the_outcomes_so_far(monkeypatch, capsys, tmp_path):
    def interrupt(number, _ended):
        if number:
            raise KeyboardInterrupt

    def run_all(commands, folder, jobs, seconds, tell):
        run_commands(commands, folder, jobs, seconds, lambda *end: (tell(*end), interrupt(*end)))

    json_file = tmp_path / "outcomes.json"
    monkeypatch.setattr(flag_combinations, "run_commands", run_all)
    with pytest.raises(SystemExit, match="130"):
        try_all(monkeypatch, "--device", "cpu", "--models", "rkm", "--precisions", "float32", "--json", str(json_file))
    assert "interrupted: all runs were stopped" in capsys.readouterr().err
    assert [run["outcome"] for run in json.loads(json_file.read_text())["runs"]] == ["trains", "trains"]


def test_runs_are_not_taken_for_parts_of_a_launcher_s(monkeypatch):
    try_all(monkeypatch, "--device", "cpu", "--models", "rkm", "--precisions", "float32", "--backends", "no_c10d")
    assert not {"MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_NODELIST"} & set(os.environ)


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
    """Some combinations; the script tries all."""
    flags = ["--models", "rkm", "--precisions", "--amp --memory-efficient-bf16", "--backends", "pytorch_ddp"]
    monkeypatch.setattr(sys, "argv", ["flag_combinations.py", *flags])
    flag_combinations.main()
    output = capsys.readouterr().out
    assert "fails" not in output
    assert "| `rkm` | --amp | no | trains |" in output
