import json

import pytest

from fairseq_rkm.experiments import classification_report, report
from fairseq_rkm.experiments.classification_jobs import PAPER_CELLS
from fairseq_rkm.ops import CELLS

ABOUT = {"hardware": "a machine", "torch": "2", "python": "3", "commit": "abc", "threads": 1}


def write(folder, model, ngram, seed, confusion, dataset="agnews", curve=((1, 80.0), (2, 90.0))):
    right, total = sum(row[i] for i, row in enumerate(confusion)), sum(map(sum, confusion))
    result = {
        "dataset": dataset, "model": model, "ngram": ngram, "seed": seed, "classes": ["World", "Sports"],
        "confusion": confusion, "accuracy": 100 * right / total, "weights": 720_000, "parameters": 10**6,
        "curve": curve, "seconds_per_epoch": 8.0, "circumstances": ABOUT,
    }  # fmt: skip
    path = folder / dataset / f"{model}-{ngram}-{seed}"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path):
    write(tmp_path, "cnn", 1, 1, [[8, 2], [4, 6]])
    write(tmp_path, "rkm_lstm", 1, 1, [[9, 1], [0, 10]])
    write(tmp_path, "rkm_lstm", 1, 2, [[9, 1], [2, 8]])
    write(tmp_path, "rkm_cifg", 1, 1, [[10, 0], [1, 9]])
    write(tmp_path, "logistic_regression", 1, 1, [[9, 1], [1, 9]], curve=[])
    write(tmp_path, "cnn", 3, 1, [[1, 0], [0, 1]], dataset="of_mine")
    return tmp_path


def test_every_cell_has_its_title_and_the_paper_s_table_has_the_paper_s_cells():
    assert {name: classification_report.TITLES[name] for name in CELLS} == {n: c.title for n, c in CELLS.items()}
    for dataset in classification_report.PAPER.values():
        assert list(dataset) == PAPER_CELLS


def test_tables_beside_the_paper_s(results):
    table = classification_report.markdown(classification_report.rows_of(report.read_results([results])))
    assert "| RKM-LSTM, 1-gram | 720,000 | 90.00 ± 7.07 | 2 | 91.76 | 2 x 8.0 s |" in table
    assert "| TF-IDF, logistic regression | 720,000 | 90.00 | 1 |  | 8.0 s |" in table
    assert (
        "1-gram, best first: rkm_cifg, rkm_lstm, cnn. Spearman's rank correlation with the paper's order: 1.00."
        in table
    )
    assert table.index("### AG News") < table.index("### of_mine")


def test_report_writes_all_of_it_for_folders_with_results(results, capsys):
    report.main([str(results), "--out", str(results / "report")])
    written = sorted(path.name for path in (results / "report").iterdir())
    assert written == ["confusion-agnews.png", "confusion-of_mine.png", "curves.png", "results.json", "results.md"]
    text = (results / "report" / "results.md").read_text()
    assert "a machine; torch 2; Python 3; commit abc; seeds 1, 2" in text
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert text in capsys.readouterr().out
    assert len(json.loads((results / "report" / "results.json").read_text())) == 6


def test_a_log_tells_curve_and_time_also_of_a_resumed_run(tmp_path):
    def line(time, kind, text):
        return f"2026-01-01 00:{time} | INFO | {kind} | {text}\n"

    def epoch(number, start, end):
        return (
            line(start, "fairseq_cli.train", "Start iterating over samples")
            + line(end, "fairseq_cli.train", 'begin validation on "valid" subset')
            + line(end, "valid", json.dumps({"epoch": number, "valid_accuracy": f"8{number}"}))
            + line(end, "train", json.dumps({"epoch": number, "train_accuracy": f"9{number}"}))
        )

    cut_off = line("05:00", "fairseq_cli.train", "Start iterating over samples")
    (tmp_path / "train.log").write_text(epoch(1, "00:10", "00:20") + cut_off + epoch(2, "10:00", "10:20"))
    assert classification_report.read_log(tmp_path / "train.log") == {
        "curve": [(1, 81.0), (2, 82.0)],
        "training_curve": [(1, 91.0), (2, 92.0)],
        "seconds_per_epoch": 15.0,
    }
