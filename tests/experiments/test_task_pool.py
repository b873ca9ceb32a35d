import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.experiments import task_pool
from fairseq_rkm.experiments.fairseq_command import fairseq_command


def note(path: Path) -> None:
    print("to the log")
    path.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


def fail(error: type[Exception]) -> None:
    raise error("as it must")


def run(tasks, tmp_path, jobs=2, devices=(None,), deadline=math.inf):
    return task_pool.run_all(tasks, tmp_path, jobs, devices, deadline, lambda folder: f"outcome of {folder.name}")


def test_tasks_run_with_a_log_and_a_gpu_each(tmp_path, capsys):
    tasks = [task_pool.Task(f"set/{i}", note, (tmp_path / f"{i}.txt",)) for i in range(4)]
    assert run(tasks, tmp_path, 2, ["0", "1"]) == []
    seen = [(tmp_path / f"{i}.txt").read_text() for i in range(4)]
    assert sorted(seen[:2]) == ["0", "1"]
    assert set(seen) == {"0", "1"}
    assert "to the log" in (tmp_path / "set" / "3.log").read_text()
    output = capsys.readouterr().out
    assert "[4/4]" in output
    assert "outcome of 3" in output
    assert "to the log" not in output


def test_gpus_are_hidden_from_the_process_that_is_forked(monkeypatch):
    for visible in (None, "3,5"):
        for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):
            monkeypatch.setenv(name, "")  # what the test sets is undone
            monkeypatch.delenv(name)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert task_pool.hide_gpus() == visible
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
        for count, wanted in ((0, [None]), (2, ["0", "1"] if visible is None else ["3", "5"])):
            counted = subprocess.CompletedProcess([], 0, f"{count}\n")
            monkeypatch.setattr(task_pool.subprocess, "run", lambda *_args, counted=counted, **_kwargs: counted)
            assert task_pool.gpus(visible) == wanted


def test_what_fails_is_named_and_does_not_stop_the_rest(tmp_path, capfd):
    errors = [task_pool.Task("mistake", fail, (RKMError,)), task_pool.Task("defect", fail, (ZeroDivisionError,))]
    assert sorted(run([*errors, task_pool.Task("last", note, (tmp_path / "last.txt",))], tmp_path)) == [
        "defect",
        "mistake",
    ]
    assert (tmp_path / "last.txt").is_file()
    assert (tmp_path / "mistake.log").read_text() == "error: as it must\n"
    assert "ZeroDivisionError" in (tmp_path / "defect.log").read_text()


def test_failures_end_the_command_and_name_their_logs():
    task_pool.exit_if_failed([], Path("out"))
    with pytest.raises(SystemExit, match=r"^failed: a \(see out/a\.log\), b/c \(see out/b/c\.log\)$"):
        task_pool.exit_if_failed(["a", "b/c"], Path("out"))


@pytest.mark.parametrize(
    ("given", "own", "rest"),
    [
        (["a", "--b", "1"], ["a", "--b", "1"], []),
        (["a", "--", "--b", "1"], ["a"], ["--b", "1"]),
        (["a", "--", "b", "--", "c"], ["a"], ["b", "--", "c"]),
        (["--"], [], []),
    ],
)
def test_what_follows_two_dashes_is_for_another_command(given, own, rest):
    assert task_pool.split_command_line(given) == (own, rest)


def test_at_the_deadline_what_runs_is_stopped_and_the_rest_not_begun(tmp_path, capsys):
    tasks = [task_pool.Task("long", time.sleep, (600,)), task_pool.Task("never", note, (tmp_path / "never.txt",))]
    assert run(tasks, tmp_path, 1, deadline=time.monotonic() + 0.3) == []
    assert "out of time, 2 not done" in capsys.readouterr().out
    assert not (tmp_path / "never.txt").exists()


def test_what_runs_says_where_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task_pool, "PROGRESS_SECONDS", 0.2)
    tasks = [task_pool.Task("long", time.sleep, (600,)), task_pool.Task("silent", time.sleep, (600,))]
    states = {"long": "epoch 3", "silent": ""}
    task_pool.run_all(
        tasks, tmp_path, 2, [None], time.monotonic() + 1, lambda _: "", lambda folder: states[folder.name]
    )
    assert "  long epoch 3\n" in capsys.readouterr().out
    task_pool.run_all(tasks[1:], tmp_path, 1, [None], time.monotonic() + 1, lambda _: "", lambda _: "")
    assert capsys.readouterr().out.startswith("out of time"), "nothing is said of what has nothing to say"


def preprocess_thrice(log: Path) -> None:
    before = list(sys.argv)
    fairseq_command("preprocess", ["a"], log)
    for flag in (1, 2):
        fairseq_command("preprocess", [flag], log, append=True)
    print("after", sys.argv == before)


def test_a_fairseq_command_writes_to_its_log_and_leaves_streams_and_arguments_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("fairseq_cli.preprocess.cli_main", lambda: print("arguments", *sys.argv))
    (tmp_path / "log").write_text("old")
    assert run([task_pool.Task("three", preprocess_thrice, (tmp_path / "log",))], tmp_path) == []
    lines = [f"arguments fairseq-preprocess {flag}\n" for flag in ("a", 1, 2)]
    assert (tmp_path / "log").read_text() == "".join(lines)
    assert (tmp_path / "three.log").read_text() == "after True\n"
