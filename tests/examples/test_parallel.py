import math
import os
import subprocess
import time
from pathlib import Path

from helpers import ROOT, load_script

parallel = load_script(ROOT / "examples" / "document_classification" / "parallel.py")
from fairseq_rkm import RKMError  # noqa: E402


def note(path: Path) -> None:
    print("to the log")
    path.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))


def fail(error: type[Exception]) -> None:
    raise error("as it must")


def run(tasks, tmp_path, jobs=2, devices=(None,), deadline=math.inf):
    return parallel.run_all(tasks, tmp_path, jobs, devices, deadline, lambda folder: f"outcome of {folder.name}")


def test_tasks_run_with_a_log_and_a_gpu_each(tmp_path, capsys):
    tasks = [parallel.Task(f"set/{i}", note, (tmp_path / f"{i}.txt",)) for i in range(4)]
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
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert parallel.hide_gpus() == visible
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        for count, wanted in ((0, [None]), (2, ["0", "1"] if visible is None else ["3", "5"])):
            counted = subprocess.CompletedProcess([], 0, f"{count}\n")
            monkeypatch.setattr(parallel.subprocess, "run", lambda *_args, counted=counted, **_kwargs: counted)
            assert parallel.gpus(visible) == wanted


def test_what_fails_is_named_and_does_not_stop_the_rest(tmp_path, capfd):
    errors = [parallel.Task("mistake", fail, (RKMError,)), parallel.Task("defect", fail, (ZeroDivisionError,))]
    assert sorted(run([*errors, parallel.Task("last", note, (tmp_path / "last.txt",))], tmp_path)) == [
        "defect",
        "mistake",
    ]
    assert (tmp_path / "last.txt").is_file()
    assert (tmp_path / "mistake.log").read_text() == "error: as it must\n"
    assert "ZeroDivisionError" in (tmp_path / "defect.log").read_text()


def test_at_the_deadline_what_runs_is_stopped_and_the_rest_not_begun(tmp_path, capsys):
    tasks = [parallel.Task("long", time.sleep, (600,)), parallel.Task("never", note, (tmp_path / "never.txt",))]
    assert run(tasks, tmp_path, 1, deadline=time.monotonic() + 0.3) == []
    assert "out of time, 2 not done" in capsys.readouterr().out
    assert not (tmp_path / "never.txt").exists()
