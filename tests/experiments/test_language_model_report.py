import json

import pytest
import torch

from fairseq_rkm.experiments import language_model_report as report
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.result_files import write_json


def line(time, kind, **entry):
    return f"2026-01-01 {time} | INFO | {kind} | {json.dumps({key: str(value) for key, value in entry.items()})}\n"


def train(time, updates, epoch):
    return line(time, "train_inner", epoch=int(epoch) + 1, update=epoch, num_updates=updates, wps=1000 + updates, ppl=9)


SESSIONS = (
    "2026-01-01 10:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)\n"
    + train("10:00:05", 50, 0.5)
    + line("10:00:10", "valid", epoch=1, valid_ppl=200.0, valid_num_updates=100)
    # Interrupted; the time until it was resumed does not count.
    + "2026-01-01 11:00:00 | INFO | fairseq_cli.train | training on 1 devices (GPUs/TPUs)\n"
    + train("11:00:05", 150, 1.5)
    + line("11:00:20", "valid", epoch=2, valid_ppl=150.0, valid_num_updates=200)
)


@pytest.fixture
def run(tmp_path):
    """What a run on Penn Treebank leaves, as far as the report looks."""

    def make(name, seed=1, test=58.0, cell="rkm_lstm", **model):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.log").write_text(SESSIONS)
        for split, perplexity in (("valid", test + 2), ("test", test)):
            (folder / f"{split}.log").write_text(
                f"x | Evaluated 82,430 tokens in 1.0s\nx | Loss (base 2): 5.9, Perplexity: {perplexity:.2f}\n"
            )
        weights = {"decoder.layers.0.weight_ih_l0": torch.zeros(8, 3), "decoder.layers.0.bias_l0": torch.zeros(8)}
        state = {"cfg": {"model": {"cell": cell, **model}, "common": {"seed": seed}}, "model": weights}
        torch.save(state, folder / "checkpoint_best.pt")
        write_json(folder / "circumstances.json", {**circumstances("ptb_fast"), "hardware": "H"})
        return folder

    return make


def test_time_is_added_up_over_sessions_and_validations_have_theirs():
    training, curve, seconds = report.read_log(SESSIONS)
    assert [int(entry["num_updates"]) for entry in training] == [50, 150]
    assert [(p.updates, p.seconds, p.perplexity) for p in curve] == [(100, 10, 200.0), (200, 30, 150.0)]
    assert seconds == 30


def test_the_table_has_the_paper_s_figures_and_means_over_seeds(run, tmp_path):
    runs = [run("a", 1, 58.0, layer_norm=True), run("b", 2, 57.0, layer_norm=True), run("c", 1, 58.9, "lstm")]
    text = report.write(runs, tmp_path / "out")
    header, _, *rows = text.splitlines()
    titles = [title.strip() for title in header.strip("|").split("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    table = [dict(zip(titles, row, strict=True)) for row in cells]
    assert [row["cell"] for row in table] == [
        "lstm", "rkm_lstm, layer norm", "rkm_lstm, layer norm", "rkm_lstm, layer norm, mean (spread)",
    ]  # fmt: skip
    assert [row["test perplexity"] for row in table] == ["58.90", "58.00", "57.00", "57.50 (0.71)"]
    assert [row["paper, valid / test"] for row in table[:2]] == ["61.2 / 58.9", "60.3 / 58.2"]
    assert table[0]["time (min:s)"] == "0:30"
    assert table[0]["epochs"] == "1.5"
    assert table[0]["recipe"] == "ptb_fast"
    assert "with cache" not in titles
    assert (tmp_path / "out/curves.png").stat().st_size > 10_000


def test_runs_of_one_seed_have_no_mean(run, tmp_path):
    text = report.write([run("a", 1, 58.0), run("b", 1, 57.0)], tmp_path / "out")
    assert "| 58.00 |" in text
    assert "| 57.00 |" in text
    assert "mean" not in text


def test_a_run_s_json_is_all_that_need_be_kept(run, tmp_path):
    folder = run("a")
    (folder / "test-cache.log").write_text("Perplexity: 52.50\n")
    first = report.write([folder], tmp_path / "one")
    assert "| 52.50 |" in first
    assert report.write([folder / "run.json"], tmp_path / "two") == first
    for name in ("results.json", "results.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


@pytest.mark.parametrize("content", ["{", "{}", '{"name": "a"}', "[]"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"other.json is not a run.json"):
        report.write([path], tmp_path / "out")


def test_the_log_of_a_classifier_is_refused(run, tmp_path):
    folder = run("a")
    with (folder / "train.log").open("a") as log:
        log.write(line("10:00:00", "valid", epoch=1, valid_accuracy=80.0, valid_num_updates=100))
    with pytest.raises(SystemExit, match=r"train\.log is not a language model's log: it has no 'valid_ppl'"):
        report.write([folder], tmp_path / "out")


def test_a_log_in_another_format_is_refused(run, tmp_path):
    folder = run("a")
    (folder / "train.log").write_text("INFO:train:{}\nepoch 1: valid ppl 9.5\n")
    with pytest.raises(SystemExit, match=r"train\.log has no line of training or validation: train with --log-format"):
        report.write([folder], tmp_path / "out")


def test_a_run_of_validations_alone_has_their_updates(run, tmp_path):
    folder = run("a")
    (folder / "train.log").write_text(line("10:00:10", "valid", epoch=1, valid_ppl=200.0, valid_num_updates=100))
    found = report.read_run(folder)
    assert (found.updates, found.epochs, found.seconds) == (100, None, None)
    assert "None" not in report.write([folder], tmp_path / "out")


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"train\.log is missing"):
        report.write([tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "cell"),
    [
        ({"_name": "rkm_lm_ptb_fast"}, "rkm_lstm, memory clip 1"),
        ({"_name": "rkm_lm_ptb_fast", "memory_clip": 2.5}, "rkm_lstm, memory clip 2.5"),
        ({"_name": "rkm_lm_ptb_fast", "layer_norm": True}, "rkm_lstm, layer norm"),
        ({"no_feedback": True, "ngram": 2}, "rkm_lstm, no feedback, 2-gram"),
        ({"no_feedback": True, "ngram": [2, 1, 1]}, "rkm_lstm, no feedback, 2, 1, 1-gram"),
        ({"no_feedback": True, "ngram": "2,1,1"}, "rkm_lstm, no feedback, 2, 1, 1-gram"),
        ({"no_feedback": True, "ngram": "1"}, "rkm_lstm, no feedback"),
        ({"_name": "rkm_lm"}, "rkm_lstm"),
        ({"_name": "rkm_lm", "memory_clip": "auto"}, "rkm_lstm, memory clip 1"),
        ({"_name": "rkm_lm", "memory_clip": "none"}, "rkm_lstm"),
        ({"_name": "rkm_lm", "memory_clip": "auto", "kernel": "gaussian"}, "rkm_lstm, gaussian kernel"),
        (
            {"_name": "rkm_lm", "memory_clip": "auto", "kernel": "polynomial", "kernel_degree": 3},
            "rkm_lstm, memory clip 1, polynomial kernel of degree 3",
        ),
    ],
)
def test_what_a_preset_adds_is_told(run, tmp_path, flags, cell):
    assert f"| {cell} |" in report.write([run("a", **flags)], tmp_path / "out")
