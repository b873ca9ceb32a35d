"""The table of signals on a small set, in this process, and its report."""

import json
import re

import numpy as np
import pytest
import torch
from signal_samples import waves

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals.array_files import from_arrays
from fairseq_rkm.experiments import report, signal_choice, signal_run, signal_sets, signal_table
from fairseq_rkm.experiments.signal_baselines import log_band_powers
from fairseq_rkm.experiments.signal_candidates import CANDIDATES
from fairseq_rkm.experiments.signal_jobs import GROUPED, RESULT, SET_TITLES, Job
from fairseq_rkm.experiments.signal_pictures import spectrum, strongest
from fairseq_rkm.experiments.signal_report import balanced_accuracy, interval_over_people, outcome, rows_of, wilson
from fairseq_rkm.models.signals import RKMSignalClassifierConfig


def small(seed=0, people=True):
    arrays = waves(24, seed=seed, people=3)
    if not people:
        del arrays["group"]
    return from_arrays("here", **arrays)


@pytest.fixture
def sets(monkeypatch):
    people = signal_sets.SignalSet(lambda _: (small(), None), window=0.5, epochs=8, lr=0.01)
    archive = signal_sets.SignalSet(lambda _: (small(people=False), small(1, people=False)), epochs=2, seeds=(1, 2))
    monkeypatch.setattr(signal_sets, "SETS", {})
    monkeypatch.setattr(signal_run, "SETS", {"eeg": people, "BasicMotions": archive})


def arguments(out, *more):
    given = ["--out", str(out), "--cpu", "--model", "encoder_hidden_size=6", *map(str, more)]
    args = signal_table.parse(given)
    args.model_flags, args.changes = signal_table.model_flags(args.model), signal_table.changes(args.recipes)
    return args


def test_people_are_left_out_one_after_the_other(sets, tmp_path):
    args = arguments(tmp_path, "--folds-at-once", 3)
    job = Job("eeg", "rkm_lstm", 12, 1)
    signal_run.run_job(args, job)
    result = json.loads((tmp_path / job.name / RESULT).read_text())
    assert [fold["name"] for fold in result["folds"]] == ["p0", "p1", "p2"]
    assert [sum(map(sum, fold["confusion"])) for fold in result["folds"]] == [16, 16, 16]
    assert [fold["recordings"] for fold in result["folds"]] == [8, 8, 8]
    assert (result["weights"], result["epochs"], result["by_group"]) == ((12 * 3 + 6) * 24, 8, True)
    assert float(outcome(tmp_path / job.name).rstrip("%")) > 80
    with np.load(tmp_path / job.name / "filters.npz") as held:
        assert held["filters"].shape == (4, 6, 3, 12)


def test_a_table_that_was_cut_off_goes_on_with_the_next_fold(sets, tmp_path, monkeypatch):
    args = arguments(tmp_path, "--epochs", 1)
    job = Job("eeg", "cnn", 3, 1)
    trained, run_folds = [], signal_run.run_folds

    def counted(args, job, experiment, folds, *more):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(folds[0].name)
        return run_folds(args, job, experiment, folds, *more)

    monkeypatch.setattr(signal_run, "run_folds", counted)
    with pytest.raises(KeyboardInterrupt):
        signal_run.run_job(args, job)
    assert not (tmp_path / job.name / RESULT).exists()
    trained.clear()
    signal_run.run_job(args, job)
    assert trained == ["p2"]
    assert len(json.loads((tmp_path / job.name / RESULT).read_text())["folds"]) == 3


def test_an_archive_s_division_is_trained_from_each_seed(sets, tmp_path):
    for model in ("gated_cnn", "band_power", "torch_lstm"):
        signal_run.run_job(arguments(tmp_path), Job("BasicMotions", model, 5, 0))
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob(RESULT)}
    assert {name: [fold["name"] for fold in one["folds"]] for name, one in results.items()} == {
        "gated_cnn-5gram": ["1", "2"], "band_power": ["1"], "torch_lstm": ["1", "2"],
    }  # fmt: skip
    first, second = results["gated_cnn-5gram"]["folds"]
    assert sum(map(sum, first["confusion"])) == 24
    assert results["band_power"]["folds"][0]["confusion"] == [[12, 0], [0, 12]], "two frequencies are easily told"
    assert first["train_windows"] == second["train_windows"] == 24


def test_the_report_has_tables_and_pictures(sets, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for dataset, model, ngram in (("eeg", "rkm_lstm", 40), ("eeg", "band_power", 1), ("BasicMotions", "cnn", 5)):
        signal_run.run_job(arguments(tmp_path, "--epochs", 1), Job(dataset, model, ngram, 1))
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    text = capsys.readouterr().out
    assert "### EEG, mental arithmetic" in text
    assert re.search(r"\| RKM-LSTM, 40-gram \| 3,024 \| [\d.]+ ± [\d.]+ \| [\d.]+ to [\d.]+ \|", text)
    assert "| 79.02 |" in text, "the paper's figure"
    assert "| log band power, ridge regression |  |" in text
    assert "95% over 3 people" in text
    assert "95% over test windows" in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "results.md", "results.json", "confusion-eeg.png", "confusion-BasicMotions.png", "people-eeg.png",
        "filters-eeg.png", "filters-BasicMotions.png",
    }  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "report" / "results.json").read_text(), "no paths of this machine"


def test_rows_are_in_the_paper_s_order_and_seeds_are_one_row():
    def run(model, ngram, seed, right):
        fold = {"name": "p", "confusion": [[right, 10 - right], [0, 10]], "recordings": 2, "recordings_right": 1}
        return {"dataset": "eeg", "model": model, "ngram": ngram, "seed": seed, "folds": [fold], "by_group": True}

    runs = [run("band_power", 1, 0, 5), run("cnn", 40, 1, 5), run("lstm", 1, 1, 5), run("lstm", 40, 1, 4),
            run("lstm", 40, 2, 8)]  # fmt: skip
    rows = rows_of(runs)
    assert [(row.model, row.ngram) for row in rows] == [("lstm", 40), ("cnn", 40), ("lstm", 1), ("band_power", 1)]
    assert rows[0].by_fold == {"p": pytest.approx(80.0)}
    assert rows[0].balanced == pytest.approx(80.0)
    assert rows[0].recordings == 50


def test_intervals():
    low, high = interval_over_people([60.0, 70.0, 80.0])
    assert (low, high) == (pytest.approx(70 - 4.3027 * 10 / 3**0.5, abs=0.01), pytest.approx(94.84, abs=0.01))
    assert interval_over_people([50.0]) == (0, 100)
    assert wilson(0.9, 50) == (pytest.approx(78.64, abs=0.02), pytest.approx(95.65, abs=0.02))
    assert wilson(1.0, 40)[1] == pytest.approx(100)
    assert balanced_accuracy([[8, 2], [0, 0]]) == 80


def test_log_band_powers_tell_the_frequency():
    windows = signal_run.windows_of(small(), None, 1)
    powers = log_band_powers(windows, 100.0).reshape(24, 5, 3)[:, :, 1]
    alpha = windows.labels.numpy() == windows.classes.index("alpha")
    assert (powers[alpha].argmax(1) == 2).all(), "10 Hz is in the band from 8 to 13"
    assert (powers[~alpha].argmax(1) == 3).all(), "20 Hz in that from 13 to 30"
    assert log_band_powers(windows, None).shape == (24, 15)
    assert np.isfinite(log_band_powers(windows, None)).all()


@pytest.mark.parametrize("model", ["dtw", "minirocket"])
def test_baselines_of_aeon_tell_two_frequencies(model, sets, tmp_path):
    pytest.importorskip("aeon", reason="of the extra signals")
    signal_run.run_job(arguments(tmp_path), Job("BasicMotions", model, 1, 0))
    folds = json.loads((tmp_path / "BasicMotions" / model / RESULT).read_text())["folds"]
    assert [fold["name"] for fold in folds] == (["1"] if model == "dtw" else ["1", "2"])
    assert min(np.trace(fold["confusion"]) for fold in folds) >= (14 if model == "dtw" else 23)


def test_the_spectrum_of_a_filter_peaks_at_its_frequency():
    times = np.arange(40) / 125
    frequencies, decibels = spectrum(np.cos(2 * np.pi * 20 * times), 125.0)
    assert abs(frequencies[decibels.argmax()] - 20) < 0.5
    filters = torch.zeros(3, 2, 4)
    filters[1, 0], filters[2, 1] = 1, 2
    assert strongest(filters.numpy(), 2) == [(2, 1), (1, 0)]


def test_the_plan_and_its_flags(tmp_path, capsys):
    jobs = signal_table.plan(arguments(tmp_path, "--models", "rkm_lstm", "band_power", "--datasets", "eeg", "seglearn"))
    assert [job.name for job in jobs] == [
        "eeg/band_power", "seglearn/band_power", "eeg/rkm_lstm-40gram-seed1", "eeg/rkm_lstm-1gram-seed1",
        "seglearn/rkm_lstm-40gram-seed1", "seglearn/rkm_lstm-1gram-seed1",
    ]  # fmt: skip
    assert set(signal_sets.SETS) == set(SET_TITLES) >= set(GROUPED)
    for flags, sentence in (
        (["--jobs", 0], "--jobs must be above 0"),
        (["--ngrams", 0], "--ngrams must be at least 1"),
        (["--datasets", "mice"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            arguments(tmp_path, *flags)
        assert sentence in capsys.readouterr().err
    for pair in ("encoder_hidden_size", "units=3", "cell=cnn"):
        with pytest.raises(RKMError, match="--model takes KEY=VALUE of rkm_signal_classifier"):
            signal_table.model_flags([pair])
    assert signal_table.model_flags(["pooling=max", "dropout=0.5"]) == {"pooling": "max", "dropout": 0.5}


def test_recipes_change_the_settings_of_sets(sets, tmp_path):
    path = tmp_path / "recipes.json"
    path.write_text(json.dumps({"eeg": {"whiten": "group", "window": 3.0, "epochs": 3, "flags": {"dropout": 0.0}}}))
    signal_sets.write(from_arrays("here", **waves(6, steps=600, people=3)), tmp_path / "eeg.npz")
    args = arguments(tmp_path, "--recipes", path, "--data", tmp_path)
    experiment = signal_run.load(args, "eeg")
    assert experiment.windows.values.shape == (12, 300, 3)
    assert 0.4 < experiment.windows.values.std() < 1.2, "whitened"
    signal_run.run_job(args, Job("eeg", "cnn", 3, 1))
    result = json.loads((tmp_path / "eeg" / "cnn-3gram-seed1" / RESULT).read_text())
    assert (result["epochs"], result["flags"]["dropout"], result["flags"]["encoder_hidden_size"]) == (3, 0.0, 6)
    assert (result["recipe"]["whiten"], result["recipe"]["window"], result["recipe"]["lr"]) == ("group", 3.0, 0.01)
    for text, sentence in (
        ("{", "cannot be read as JSON"),
        ('{"mice": {}}', "must hold settings by the name of a set"),
        ('{"eeg": {"speed": 1}}', "and not speed"),
    ):
        path.write_text(text)
        with pytest.raises(RKMError, match=sentence):
            signal_run.load(arguments(tmp_path, "--recipes", path), "eeg")


def test_cells_see_the_recipes_rate_and_baselines_the_files(sets, tmp_path):
    path = tmp_path / "recipes.json"
    path.write_text(json.dumps({"eeg": {"resample": 50.0, "window": 1.0}}))
    signal_sets.write(from_arrays("here", **waves(6, steps=600, people=3)), tmp_path / "eeg.npz")
    args = arguments(tmp_path, "--recipes", path, "--data", tmp_path)
    rates = {model: signal_run.load(args, "eeg", model).rate for model in ("cnn", "torch_lstm", "minirocket", "dtw")}
    assert rates == {"cnn": 50, "torch_lstm": 50, "minirocket": 100, "dtw": 100}


def test_recipes_are_chosen_without_test_parts_and_without_half_of_the_people(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal_choice, "SETS", signal_run.SETS)
    weak, strong = ({"epochs": epochs, "flags": {"encoder_hidden_size": 6}} for epochs in (1, 30))
    monkeypatch.setattr(signal_choice, "CANDIDATES", {"eeg": [weak, strong], "BasicMotions": [strong]})
    signal_sets.write(from_arrays("here", **waves(24, people=4)), tmp_path / "eeg.npz")
    signal_choice.main(["--data", str(tmp_path), "--out", str(tmp_path), "--datasets", "eeg", "BasicMotions",
                        "--ngram", "12", "--cpu"])  # fmt: skip
    assert json.loads((tmp_path / "recipes.json").read_text()) == {"eeg": strong, "BasicMotions": strong}
    found = json.loads((tmp_path / "choice.json").read_text())["candidates"]
    assert [row["windows"] for row in found["eeg"]] == [24, 24], "12 recordings of two of the four people"
    assert [row["windows"] for row in found["BasicMotions"]] == [24], "the training part alone"
    assert found["eeg"][0]["accuracy"] < found["eeg"][1]["accuracy"]
    assert signal_table.changes(tmp_path / "recipes.json")["eeg"] == strong


def test_inner_parts_share_no_person_and_have_all_classes():
    experiment = signal_choice.inner(small(), 0.5)
    people = np.array(small().groups)[experiment.windows.recordings]
    assert [set(people[fold.test]) for fold in experiment.folds] == [{"p0"}, {"p1"}, {"p2"}]
    archive = signal_choice.inner(small(people=False), None)
    tested = np.concatenate([fold.test for fold in archive.folds])
    assert sorted(tested) == list(range(24))
    assert all(len(set(archive.windows.labels[torch.from_numpy(fold.test)].tolist())) == 2 for fold in archive.folds)


def test_every_candidate_is_a_recipe_of_its_set():
    for name, candidates in CANDIDATES.items():
        for recipe in candidates:
            changed = signal_sets.SETS[name].changed(recipe)
            RKMSignalClassifierConfig(**changed.flags)


def test_missing_data_end_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"table: error: no \.npz files in .*eeg_mental_arithmetic: give --data"):
        signal_table.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--cpu"])
