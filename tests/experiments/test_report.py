import json
import sys

import pytest

from fairseq_rkm.experiments import report

ABOUT = {"hardware": "H", "torch": "2", "python": "3", "commit": "c", "threads": 1}
TRANSLATION = {
    "model": "rkm_lstm", "seed": 1, "languages": "de-en", "parameters": 1000, "bleu": {"test": 30.0}, "minutes": 2.0,
    "signature": "s", "circumstances": ABOUT,
}  # fmt: skip
CLASSIFIER = {
    "dataset": "news", "model": "cnn", "ngram": 1, "seed": 1, "classes": ["a", "b"], "confusion": [[1, 0], [0, 1]],
    "accuracy": 100.0, "weights": 10, "parameters": 20, "curve": [], "seconds_per_epoch": 1.0, "circumstances": ABOUT,
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    def write(name, **files):
        (tmp_path / name).mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        return tmp_path / name

    return write


def test_translations_are_tabulated_with_their_speeds_and_their_samples(results, tmp_path, capsys):
    speed = {"training_tokens_per_second": 5000, "generation_sentences_per_second": 70.0, "circumstances": ABOUT}
    run = results("out/rkm_lstm-1", result=TRANSLATION, speed=speed)
    data = results("data", data={"languages": ["de", "en"]})
    (data / "raw").mkdir()
    for path in (data / "raw/test.de", data / "raw/test.en", run / "test.txt"):
        path.write_text(f"{path.name}\n")
    report.main([str(run.parent), "--out", str(tmp_path / "report"), "--samples", str(data)])
    text = (tmp_path / "report/results.md").read_text()
    assert "| de-en | `rkm_lstm` | 1,000 | 30.00 | 1 | 2.0 | 5,000 | 70 |" in text
    assert "- de: test.de\n- en: test.en\n- `rkm_lstm`: test.txt" in text
    assert text in capsys.readouterr().out
    assert json.loads((tmp_path / "report/results.json").read_text())["runs"][0]["speed"] == speed
    assert (tmp_path / "report/bleu.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("contents", "flags", "message"),
    [
        ([], [], r"train\.log is missing: give .* or a folder with result\.json"),
        ([TRANSLATION, CLASSIFIER], [], "classifiers and translations: make a report of each"),
        ([CLASSIFIER], ["--samples", "x"], "--samples is for translations"),
        ([CLASSIFIER, CLASSIFIER], [], "out/0 and .*out/1 are of one row and seed: .* scripts/kernel_tables.py"),
        ([{"epochs": 3}], [], "0 has a damaged result or speed file: neither a classifier's nor a translation's"),
        ([3], [], "0 has a damaged result or speed file"),
    ],
)
def test_folders_that_make_no_report(results, tmp_path, contents, flags, message):
    for i, content in enumerate(contents):
        results(f"out/{i}", result=content)
    with pytest.raises(SystemExit, match=message):
        report.main([str(tmp_path / "out"), "--out", str(tmp_path / "report"), *flags])
    assert not (tmp_path / "report").exists()


def test_no_run_is_left_out_in_silence(results, tmp_path):
    folders = [str(results("out/a", result=CLASSIFIER)), str(results("out/b", run={}))]
    with pytest.raises(SystemExit, match=r"no result\.json in \S+out/b, as in others"):
        report.main([*folders, "--out", str(tmp_path / "report")])


def test_a_file_that_was_cut_off_is_named(results, tmp_path):
    run = results("out/a", result=TRANSLATION)
    (run / "speed.json").write_text("{")
    with pytest.raises(SystemExit, match=r"out/a has a damaged result or speed file"):
        report.read_results([tmp_path])


@pytest.mark.parametrize("content", [TRANSLATION, CLASSIFIER])
def test_without_matplotlib_there_are_tables_and_a_sentence(results, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = results("out/a", result=content)
    report.main([str(run), "--out", str(tmp_path / "report")])
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["results.json", "results.md"]
    captured = capsys.readouterr()
    assert captured.err == "pictures are drawn by matplotlib, which is not installed: pip install matplotlib\n"
    assert "learning curves" not in captured.out


def test_what_to_give_is_said(capsys):
    with pytest.raises(SystemExit):
        report.main([])
    assert "give runs, and --out for the results" in capsys.readouterr().err


def test_circumstances_are_noted_before_a_run(tmp_path):
    report.main(["--circumstances", str(tmp_path), "--config", "ptb_fast"])
    noted = json.loads((tmp_path / "circumstances.json").read_text())
    assert noted["config"] == "ptb_fast"
    assert noted.keys() == {"config", "commit", "hardware", "threads", "python", "torch"}
