import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import assert_close

from fairseq_rkm.experiments import benchmark, sweep_benchmark, sweep_measurement
from fairseq_rkm.experiments.flashrnn_layer import FlashRNNLayer
from fairseq_rkm.experiments.recurrence_benchmark import outcome
from fairseq_rkm.experiments.sweep_measurement import Contender, Field, GPUError, measure_field, products_in

SMALL = ["--device", "cpu", "--length", 3, "--seconds", 0.001]
FIELD = Field(length=3, size=4, batch=2, precision="float32")
PLAIN = Contender("rkm_lstm", feedback=True, memory_clip="auto", backend="batched")


def sweep(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "sweep", *map(str, [*SMALL, *flags])])
    benchmark.main()


def test_a_grid_is_measured_told_drawn_and_kept(monkeypatch, tmp_path, capsys):
    flags = ["--sizes", 6, 4, "--batches", 1, 2, "--backends", "auto", "batched", "persistent"]
    sweep(monkeypatch, *flags, "--json", tmp_path / "new" / "a.json", "--plot", tmp_path / "a.png")
    rows = json.loads((tmp_path / "new" / "a.json").read_text())
    assert len(rows) == 2 * 2 * 2 * 3
    places = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    assert places[0] == (6, 1)
    assert places[-1] == (4, 2)
    for row in rows:
        assert {"commit", "hardware", "torch"} < row.keys()
        if row["backend"] == "persistent":
            assert "backend 'persistent' cannot run this" in row["failure"]
            assert "eager" not in row
            continue
        assert "failure" not in row
        assert row["picked"] != "auto"
        assert 0 < row["error"] < 1e-5
        assert row["eager_ratio"] == row["lstm"]["eager"]["median_ms"] / row["eager"]["median_ms"]
    out = capsys.readouterr().out
    assert "| d | B 1 | B 2 |" in out
    assert "| 6 | refused | refused |" in out
    assert "of 4 fields at 1.0 or more" in out
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_fields_with_small_places_in_all_lists_come_first():
    args = SimpleNamespace(sizes=(7, 8, 7), batches=(1, 2), precisions=["float32", "bfloat16"], length=5)
    fields = sweep_benchmark.fields_of(args)
    assert len(fields) == 8
    assert fields[0] == Field(5, 7, 1, "float32")
    assert set(fields[1:4]) == {Field(5, 8, 1, "float32"), Field(5, 7, 2, "float32"), Field(5, 7, 1, "bfloat16")}
    assert fields[-1] == Field(5, 8, 2, "bfloat16")


def test_a_sweep_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    measured = []

    def stop_at_the_third(field, contenders, *rest):
        measured.append((field.size, field.batch, [c.backend for c in contenders]))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure_field(field, contenders, *rest)

    monkeypatch.setattr(sweep_benchmark, "measure_field", stop_at_the_third)
    file = tmp_path / "a.json"
    flags = ["--sizes", 4, "--batches", 1, 2, 3, 4, "--feedback", "yes", "--json", file, "--backends", "batched"]
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, *flags)
    assert len(json.loads(file.read_text())) == 2
    sweep(monkeypatch, *flags)
    assert [batch for _, batch, _ in measured] == [1, 2, 3, 3, 4]
    sweep(monkeypatch, *flags, "reference")
    assert [backends for *_, backends in measured[5:]] == [["reference"]] * 4
    capsys.readouterr()
    sweep(monkeypatch, *flags)
    assert len(measured) == 9
    assert "0 fields to measure" in (out := capsys.readouterr().out)
    assert "backend reference" in out
    sweep(monkeypatch, *flags, "--again")
    assert len(measured) == 13
    assert len(json.loads(file.read_text())) == 8


def test_rows_of_another_commit_are_measured_anew_and_told(monkeypatch, tmp_path, capsys):
    file = tmp_path / "a.json"
    flags = ["--sizes", 4, "--feedback", "yes", "--json", file, "--backends", "batched"]
    sweep(monkeypatch, *flags, "--batches", 1, 2)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, "commit": "an older one"} for row in rows]))
    sweep(monkeypatch, *flags, "--batches", 1)
    assert [row["commit"] == "an older one" for row in json.loads(file.read_text())] == [False, True]
    assert "These rows are of 2 machines, versions or commits" in capsys.readouterr().out


def test_no_field_is_started_after_the_time_is_up(monkeypatch, capsys):
    seconds = iter([0, 0, 61, 130])
    monkeypatch.setattr(sweep_benchmark, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    sweep(monkeypatch, "--sizes", 4, "--batches", 1, 2, 3, 4, "--minutes", 2, "--backends", "batched")
    out = capsys.readouterr().out
    assert "[2/4, 1.0 min]" in out
    assert "time is up: 2 fields are not measured" in out


def test_what_fails_is_told_in_its_field_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    right = sweep_measurement._error

    def fail(layer, x):
        if x.size(1) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if x.size(1) == 2:
            raise RuntimeError("a strange state\nwith a long story")
        return 0.1 if x.size(1) == 3 else right(layer, x)

    monkeypatch.setattr(sweep_measurement, "_error", fail)
    flags = ["--sizes", 4, "--batches", 1, 2, 3, 4, "--feedback", "no", "--backends", "batched"]
    with pytest.raises(SystemExit, match="1 results are wrong, and have no time"):
        sweep(monkeypatch, *flags, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row.get("failure") for row in rows] == ["out of memory", "a strange state", "wrong: off by 1.0e-01", None]
    assert ["eager" in row for row in rows] == [False, False, False, True]
    assert "| 4 | memory | failed | wrong | " in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()


def test_an_lstm_that_fails_leaves_the_others_their_times(monkeypatch):
    def refuse(*_sizes, **_options):
        raise RuntimeError("cuDNN does not take this")

    monkeypatch.setattr(sweep_measurement.nn, "LSTM", refuse)
    (row,) = measure_field(FIELD, [PLAIN], "cpu", 0.001)
    assert row["lstm"] == {"failure": "cuDNN does not take this"}
    assert row["eager"]["median_ms"] > 0
    assert "eager_ratio" not in row
    assert "nn.LSTM: cuDNN does not take this" in sweep_benchmark.line(row)


def test_a_field_after_which_the_gpu_is_in_error_has_rows_all_the_same(monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(sweep_measurement, "_fill", fail)
    monkeypatch.setattr(sweep_measurement, "_is_in_error", lambda: True)
    with pytest.raises(GPUError) as error:
        measure_field(FIELD, [PLAIN], "cuda", 0.001)
    (row,) = error.value.args[0]
    assert (row["failure"], row["lstm"]) == ("illegal memory access", {})


def test_the_sweep_ends_when_the_gpu_takes_no_more(monkeypatch, tmp_path):
    rows = [{**FIELD._asdict(), **vars(PLAIN), "failure": "illegal memory access", "lstm": {}}]

    def break_down(*_arguments):
        raise GPUError(rows)

    monkeypatch.setattr(sweep_benchmark, "measure_field", break_down)
    with pytest.raises(SystemExit, match="the GPU takes no further work after the last field; start again to go on"):
        sweep(monkeypatch, "--sizes", 4, "--batches", 2, 3, "--json", tmp_path / "a.json")
    assert [row["failure"] for row in json.loads((tmp_path / "a.json").read_text())] == ["illegal memory access"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", ["auto", 0.2])
@pytest.mark.parametrize("feedback", [True, False])
def test_right_results_pass_and_others_do_not(monkeypatch, precision, clip, feedback):
    field = Field(20, 24, 5, precision)
    contender = Contender("rkm_lstm", feedback, clip, "batched")
    (row,) = measure_field(field, [contender], "cpu", 0.001)
    assert "failure" not in row
    right = sweep_measurement.reference_of

    def wrong(rkm):
        copy = right(rkm)
        copy.bias_l0.data[-1] += 3
        return copy

    monkeypatch.setattr(sweep_measurement, "reference_of", wrong)
    (row,) = measure_field(field, [contender], "cpu", 0.001)
    assert row["failure"].startswith("wrong: off by")


def test_a_backend_that_auto_picks_is_measured_once():
    auto, named = (Contender("rkm_lstm", True, "auto", name) for name in ("auto", "reference"))
    first, second = measure_field(FIELD, [named, Contender(**{**vars(named), "feedback": False})], "cpu", 0.001)
    assert first["eager"] != second["eager"]
    named = Contender(**{**vars(auto), "backend": measure_field(FIELD, [auto], "cpu", 0.001)[0]["picked"]})
    first, second = measure_field(FIELD, [auto, named], "cpu", 0.001)
    assert (first["backend"], second["backend"]) == ("auto", named.backend)
    assert first["eager"] == second["eager"]


def test_auto_behind_another_backend_by_more_than_a_tenth_is_told():
    def row(backend, picked, ms):
        return {**FIELD._asdict(), **vars(PLAIN), "backend": backend, "picked": picked, "graph": {"median_ms": ms}}

    rows = [row("auto", "persistent", 1.2), row("batched", "batched", 1.0)]
    assert "persistent takes 1.20 times as long as batched" in sweep_benchmark.regrets(rows)[0]
    rows[0]["graph"]["median_ms"] = 1.09
    assert not sweep_benchmark.regrets(rows)


def test_precisions_switch_the_products_of_pytorch_and_cudnn():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends]
    for precision in sweep_measurement.PRECISIONS:
        with products_in(precision):
            assert [b.allow_tf32 for b in backends] == [precision == "tf32"] * 2
    assert [b.allow_tf32 for b in backends] == before


def flashrnn(gates, recurrent, bias, *, function, backend, dtype):
    """FlashRNN's interface, step by step: ``(B, T, 4, 1, d)`` to ``(2, B, T, 1, d)``."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float64")
    h = c = gates.new_zeros(gates.size(0), gates.size(-1))
    states = []
    for x in gates.unbind(1):
        i, f, z, o = (x[:, :, 0] + (h @ recurrent[:, 0].mT).transpose(0, 1) + bias[:, 0]).unbind(1)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack([h, c]))
    return torch.stack(states, 2).unsqueeze(3), torch.stack([h, c])[:, :, None, None]


def test_flashrnn_gets_the_weights_of_an_lstm(monkeypatch):
    module = ModuleType("flashrnn")
    module.flashrnn = flashrnn
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    lstm = torch.nn.LSTM(3, 5, dtype=torch.float64)
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    for given, wanted in zip(outcome(FlashRNNLayer(lstm), x), outcome(lstm, x), strict=True):
        assert_close(given, wanted)
    assert sweep_measurement._error(FlashRNNLayer(lstm), x) < 1e-12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", 0], "0 is not above 0"),
        (["--memory-clip", "wide"], "memory_clip must be 'auto', 'none'"),
        (["--backends", "gpu"], "unknown backend 'gpu'"),
        (["--precisions", "tf32"], "TF32 is a GPU's"),
        (["--cell", "cnn", "--feedback", "yes"], "the cell 'cnn' has no feedback"),
    ],
)
def test_bad_flags_are_explained(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        sweep(monkeypatch, *flags)
    assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("content", ["{", "3", '[{"shape": [3, 2, 4, 4], "cell": "rkm_lstm"}]'])
def test_another_file_is_not_written_over(monkeypatch, tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SystemExit, match="holds no rows of a sweep"):
        sweep(monkeypatch, "--sizes", 4, "--json", tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == content


def test_a_graph_that_cannot_be_recorded_leaves_the_eager_figure(tmp_path):
    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    ratios = {"eager_ratio": 2.0, "graph_ratio": 0.5}
    times = {kind: {"median_ms": 1.0} for kind in ("eager", "graph")}
    about = {"picked": "batched", "error": 1e-6, "lstm": times, "hardware": "a GPU", "torch": "2", "commit": "abc"}
    rows = [{**FIELD._asdict(), **vars(PLAIN), **about, **times, **ratios, "batch": batch} for batch in (1, 2)]
    del rows[1]["graph"], rows[1]["graph_ratio"]
    sweep_measurement._time("graph", [(rows[1], fail)], "cpu", 0.001)
    assert rows[1]["graph_failure"] == "operation not permitted when stream is capturing"
    assert "failure" not in rows[1]
    assert "| 4 | 2.00 / 0.50 batched | 2.00 / failed batched |" in sweep_benchmark.markdown(rows)
    assert sweep_benchmark.line(rows[1]).endswith("2.00x; no graph: operation not permitted when stream is capturing")
    assert "as CUDA graphs: 0 of 1 fields at 1.0 or more" in sweep_benchmark.summary(rows)
    sweep_benchmark.heat_maps(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.gpu
def test_fields_on_a_gpu_are_timed_eager_and_as_graphs(monkeypatch, tmp_path):
    flags = ["--sizes", 64, 100, "--batches", 3, "--backends", "auto", "batched", "--no-flashrnn", "--device", "cuda"]
    sweep(monkeypatch, *flags, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 2 * 4 * 2 * 2
    for row in rows:
        assert not {"failure", "graph_failure"} & row.keys()
        assert row["graph_ratio"] == row["lstm"]["graph"]["median_ms"] / row["graph"]["median_ms"]
        assert row["backend"] in ("auto", row["picked"])
    picked = {(row["precision"], row["feedback"]): row["picked"] for row in rows if row["backend"] == "auto"}
    assert picked["bfloat16", False] == "scan"
    assert picked["float32", True] == "blockwise"
