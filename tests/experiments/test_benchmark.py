import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from fairseq.data import Dictionary
from helpers import assert_close

from fairseq_rkm import RKM
from fairseq_rkm.data.indexed_check import check_split
from fairseq_rkm.experiments import benchmark, corpus_benchmark, recurrence_benchmark
from fairseq_rkm.experiments.derivatives_benchmark import ways_of
from fairseq_rkm.ops import wavefront


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, flags)])
    benchmark.main()


def recurrence(monkeypatch, *flags) -> None:
    run(monkeypatch, "recurrence", "--device", "cpu", "--seconds", 0.01, *flags)


def test_each_cell_is_checked_and_timed_beside_the_lstm(monkeypatch, tmp_path, capsys):
    flags = ["--cell", "rkm_lstm", "rkm_cifg", "--shape", "3,2,4,5", "2,3,4,4"]
    recurrence(monkeypatch, *flags, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["cell"] for row in rows] == ["nn.LSTM", "rkm_lstm", "rkm_cifg"] * 2
    for row in rows[1:3]:
        assert 0 < row["error"] < 1e-4
        for kind in ("forward", "forward_backward"):
            medians = [r[kind]["median_ms"] for r in (rows[0], row)]
            assert row[f"{kind}_ratio"] == medians[0] / medians[1]
    assert capsys.readouterr().out.count("| 3, 2, 4, 5 | float32 |") == 3
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_kernels_are_checked_and_timed(monkeypatch, tmp_path, capsys):
    flags = ["--kernel", "linear", "gaussian", "--shape", "3,2,4,5", "--no-feedback"]
    recurrence(monkeypatch, *flags, "--json", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row.get("kernel") for row in rows] == [None, "linear", "gaussian"]
    output = capsys.readouterr().out
    assert "| rkm_lstm without feedback |" in output
    assert "| rkm_lstm without feedback, gaussian kernel |" in output


def test_a_stack_in_both_directions_is_checked_and_timed(monkeypatch, tmp_path, capsys):
    recurrence(monkeypatch, "--shape", "3,2,4,5", "--layers", 2, "--bidirectional", "--json", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert {(row["num_layers"], row["bidirectional"]) for row in rows} == {(2, True)}
    assert "| nn.LSTM, 2 layers, both directions |" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--wavefront", "1"], ["--wavefront", "2"]], ids=str)
def test_a_stack_side_by_side_is_checked_and_timed(monkeypatch, tmp_path, capsys, flags):
    stand_ins.run_side_by_side(monkeypatch, chunks=3)
    ran = []
    run = wavefront.recurrence
    monkeypatch.setattr(wavefront, "recurrence", lambda *problem: ran.append(problem[2].chunks) or run(*problem))
    recurrence(monkeypatch, "--shape", "6,2,4,5", "--layers", 2, *flags, "--json", tmp_path / "a.json")
    wanted = int(flags[1]) if flags else 3
    assert json.loads((tmp_path / "a.json").read_text())[1]["stretches"] == wanted
    assert set(ran) == {wanted} - {1}
    assert (f"| rkm_lstm, 2 layers, side by side over {wanted} stretches |" in capsys.readouterr().out) == (wanted > 1)


def test_a_wrong_result_is_an_error_and_no_row(monkeypatch, tmp_path, capsys):
    right = recurrence_benchmark.reference_of

    def wrong(rkm):
        copy = right(rkm)
        torch.nn.init.zeros_(copy.weight_hh_l0)
        return copy

    monkeypatch.setattr(recurrence_benchmark, "reference_of", wrong)
    with pytest.raises(SystemExit, match=r"rkm_lstm at \(3, 2, 4, 5\) in float32 is wrong"):
        recurrence(monkeypatch, "--shape", "3,2,4,5", "--json", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()
    assert "|" not in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "turns"), [(40, 10), (0.01, 5)])
def test_contenders_are_timed_in_turns(monkeypatch, seconds, turns):
    """By a clock that a second passes on each time it is read."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(recurrence_benchmark, "time", clock)
    calls = []
    times = recurrence_benchmark.timed([lambda: calls.append(0), lambda: calls.append(1)], "cpu", seconds)
    assert [set(own) for own in times] == [{1000}, {1000}]
    # Five calls of each to warm up, and one at the beginning of each turn, are not counted.
    assert calls[:10] == [0] * 5 + [1] * 5
    held = [(who, len(list(group)) - 1) for who, group in itertools.groupby(calls[10:])]
    assert [who for who, _ in held] == [0, 1] * turns
    for who in (0, 1):
        assert sum(count for i, count in held if i == who) == len(times[who]) >= 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shape", "3,2,4"], "a shape is T,B,m,d, four positive numbers, not '3,2,4'"),
        (["--shape", "3,2,4,0"], "not '3,2,4,0'"),
        (["--shape", "3,2,4,5", "--backend", "persistent"], "backend 'persistent' cannot run this"),
        (["--shape", "3,2,4,5", "--colour", "red"], "unknown arguments: --colour red"),
    ],
)
def test_bad_flags_are_explained(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        recurrence(monkeypatch, *flags)
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_whole_updates_of_a_command_that_fails_show_its_end(monkeypatch):
    with pytest.raises(SystemExit, match="fairseq-train failed or was too short"):
        run(monkeypatch, "train", "no-such-folder", "--task", "language_modeling", "--cpu")


def test_a_made_corpus_is_read_by_each_process(monkeypatch, tmp_path, capfd):
    """Here in this process; the command starts one for each rank."""
    ranks = []

    class Rank:
        returncode = 0

        def __init__(self, command, **_kwargs):
            folder, *numbers = command[3:]
            check_split(f"{folder}/train", Dictionary.load(f"{folder}/dict.txt"))
            ranks.append(corpus_benchmark.read(folder, *map(int, numbers)))

        def communicate(self):
            return " ".join(map(str, ranks[-1])), None

    monkeypatch.setattr(corpus_benchmark, "Popen", Rank)
    monkeypatch.setattr(corpus_benchmark, "MADE_AT_ONCE", 1000)
    flags = ["--tokens", 30_000, "--processes", 2, "--batch-size", 4, "--batches", 20, "--folder", tmp_path]
    run(monkeypatch, "corpus", *flags, "--json", tmp_path / "a.json")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [(row["rank"], row["tokens"]) for row in rows] == [(0, 30_000), (1, 30_000)]
    for row in rows:
        assert 0 < row["open_s"] < row["first_batch_s"]
        assert row["batch_us"] > 0
        assert row["memory_mib"] <= row["peak_mib"]
    assert capfd.readouterr().out.count("| 30,000 |") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_kernels_are_measured_on_a_machine_without_fairseq():
    program = "import sys; sys.modules['fairseq'] = None; import fairseq_rkm.experiments.benchmark"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_derivatives_are_timed_against_ordinary_gradients(monkeypatch, tmp_path, capsys):
    flags = ["--device", "cpu", "--seconds", 0.01, "--cell", "rkm_cifg", "--shape", "3,2,4,5"]
    run(monkeypatch, "derivatives", *flags, "--json", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert next(iter(row["ms"])) == "gradients of the weights"
    assert all(ms > 0 for ms in row["ms"].values())
    assert re.search(r"gradients of the weights +[\d.]+ ms +1\.0 x", capsys.readouterr().out)


def test_the_ways_to_gradients_of_each_sample_agree():
    rkm, x = RKM(4, 5, cell="lstm"), torch.randn(3, 2, 4)
    ways = ways_of(rkm, x)
    together = ways["gradients of each sample, vmap(grad)"]().values()
    alone = zip(*ways["gradients of each sample, one by one"](), strict=True)
    for given, wanted in zip(together, alone, strict=True):
        assert_close(given, torch.stack(wanted))
    assert_close(
        sum(g.sum() for g in ways["torch.func.grad"]().values()),
        sum(g.sum() for g in ways["gradients of the weights"]()),
    )
    assert any(g is not None and g.any() for g in ways["a penalty on gradients (create_graph)"]())
