import json
import sys

import pytest
import torch

from fairseq_rkm.experiments import benchmark, scaling_benchmark, timed_training
from fairseq_rkm.experiments.timed_training import PARTS, UpdateClock

SMALL = [
    "--device", "cpu", "--updates", 12, "--tokens-per-sample", 7, "--words", 30, "--decoder-embed-dim", 8,
    "--decoder-hidden-size", 12, "--decoder-layers", 2,
]  # fmt: skip


def scaling(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "scaling", *map(str, flags)])
    benchmark.main()


def test_two_processes_are_measured_against_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "a.json").write_text('[{"earlier": 1}]')
    files = ["--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"]
    scaling(monkeypatch, "--gpus", 2, 1, "--batch", 3, *SMALL, *files)
    earlier, one, two = json.loads((tmp_path / "a.json").read_text())
    assert earlier == {"earlier": 1}
    assert [(row["gpus"], row["batch"], row["graphs"]) for row in (one, two)] == [(1, 3, False), (2, 3, False)]
    for row in (one, two):
        assert row["updates"] == 8, "of 12 the last is not ended, and a quarter warms up"
        assert sum(row["parts_ms"].values()) == pytest.approx(row["update_ms"])
        assert all(milliseconds > 0 for milliseconds in row["parts_ms"].values())
        assert row["tokens_per_second"] == pytest.approx(1000 * 3 * 7 * row["gpus"] / row["update_ms"])
        assert row["ratio"] == row["tokens_per_second"] / one["tokens_per_second"]
        assert {"hardware", "commit", "torch"} <= row.keys()
    output = capsys.readouterr().out
    assert "CUDA graphs are left out: there is no GPU to replay them" in output
    assert output.count("\n| 3 | ") == 2
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.fixture
def no_training(monkeypatch):
    """Each part takes a tenth of the number of GPUs, in ms; each graph halves it. The runs are returned."""
    runs = []

    def train(_data, _args, batch, gpus, graphs):
        runs.append((batch, gpus, graphs))
        return [dict.fromkeys(PARTS, gpus / 10 / (1 + graphs)) for _ in range(8)]

    monkeypatch.setattr(scaling_benchmark, "train", train)
    monkeypatch.setattr(scaling_benchmark, "make_corpus", lambda *_args, **_kwargs: None)
    return runs


def test_numbers_beyond_the_machine_are_left_out_in_a_sentence(monkeypatch, capsys, no_training):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # PyTorch for CUDA would look for the GPUs' names.
    monkeypatch.setattr(scaling_benchmark, "circumstances", lambda _config: {"hardware": "two GPUs"})
    scaling(monkeypatch, "--device", "cuda", "--gpus", 1, 2, 4, 8, "--batch", 80, 20)
    output = capsys.readouterr().out
    assert "4 GPUs are left out: here are 2" in output
    assert "8 GPUs are left out: here are 2" in output
    assert no_training == [(b, n, graphs) for b in (80, 20) for n in (1, 2) for graphs in (False, True)]
    assert "| 80 | 2 | yes | 28,000,000 (28,000,000, 28,000,000) | 1.00 | 0.40 | 0.10 | 0.10 | 0.10 | 0.10 |" in output


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("content", ["{", '{"a": 1}'])
def test_another_file_is_not_written_over(monkeypatch, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit, match=r"holds no .*rows.*give --json another name"):
        scaling(monkeypatch, *SMALL, "--json", tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == content


def test_too_few_updates_are_refused(monkeypatch):
    monkeypatch.setattr(scaling_benchmark, "train", lambda *_: [dict.fromkeys(PARTS, 1.0)])
    with pytest.raises(SystemExit, match="12 updates are too few to measure"):
        scaling(monkeypatch, "--gpus", 1, *SMALL)


def test_a_process_that_fails_ends_the_others_and_shows_its_words(monkeypatch):
    command = [sys.executable, "-c", "import sys, time; '0' in sys.argv[-1:] and time.sleep(600); sys.exit('no luck')"]
    monkeypatch.setattr(scaling_benchmark, "RECIPE", [])
    popen = scaling_benchmark.subprocess.Popen
    started = []

    def start(given, **kwargs):
        started.append(popen([*command, given[-1]], **kwargs))
        return started[-1]

    monkeypatch.setattr(scaling_benchmark.subprocess, "Popen", start)
    with pytest.raises(SystemExit, match=r"(?s)the process of rank 1 failed:.*no luck"):
        scaling(monkeypatch, "--gpus", 2, "--batch", 3, *SMALL)
    assert [process.returncode for process in started] == [-9, 1]


def test_the_clock_counts_all_time_to_one_part(monkeypatch):
    seconds = iter([0, 1, 3, 6, 10, 15, 16, 18, 21, 25])
    monkeypatch.setattr(timed_training.time, "perf_counter", lambda: next(seconds))
    clock = UpdateClock(on_gpu=False)
    for part in ["host", *PARTS, *PARTS, "passes"]:
        clock.mark(part)
    assert clock.updates() == [
        {"passes": 1000, "reduction": 2000, "optimizer": 3000, "host": 4000},
        {"passes": 5000, "reduction": 1000, "optimizer": 2000, "host": 3000},
    ]


@pytest.mark.gpu(count=2)
def test_two_gpus_are_measured_with_graphs_and_without(monkeypatch, tmp_path):
    flags = [*SMALL[2:], "--updates", 40, "--device", "cuda", "--json", tmp_path / "a.json"]
    scaling(monkeypatch, "--gpus", 1, 2, "--batch", 3, *flags)
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [(row["gpus"], row["graphs"]) for row in rows] == [(1, False), (1, True), (2, False), (2, True)]
    for row in rows:
        assert sum(row["parts_ms"].values()) == pytest.approx(row["update_ms"])
