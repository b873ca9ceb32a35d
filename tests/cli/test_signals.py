"""From recordings to classes of new ones, as a user goes: prepare.py, fairseq's commands, predict."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from signal_samples import CLASSES, RATE, WAVE, waves, write_npz
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from cli.conftest import Result, hydra_flags, succeed
from fairseq_rkm import RKMError, predict
from fairseq_rkm.experiments import signal_data, signal_scores
from fairseq_rkm.models import RKMClassifier, RKMSignalClassifier
from fairseq_rkm.models.signals import SignalEstimator

TASK = [
    "--user-dir", "fairseq_rkm", "--task", "signal_classification", "--criterion", "sentence_prediction", "--cpu",
    "--num-workers", "0", "--log-format", "json",
]  # fmt: skip
SMALL = [
    *TASK, "--arch", "rkm_signal_classifier", "--encoder-hidden-size", "16", "--optimizer", "adam", "--lr", "0.01",
    "--clip-norm", "1", "--batch-size", "16", "--no-epoch-checkpoints", "--log-interval", "10", "--noise", "0.1",
    "--time-masks", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def test_file(folder) -> Path:
    return write_npz(folder / "test.npz", **waves(50, steps=190, seed=7))


@pytest.fixture(scope="module")
def data(folder, test_file) -> Path:
    train = write_npz(folder / "train.npz", **waves(240, steps=190, seed=3))
    flags = ["--train", train, "--test", test_file, "--window", "1s", "--stride", "300ms", "--out", folder / "data"]
    signal_data.main([str(flag) for flag in flags])
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data, folder) -> tuple[Path, Result]:
    run = folder / "run"
    return run, succeed("train", data, *SMALL, "--max-epoch", 4, "--save-dir", run)


@pytest.fixture(scope="module")
def classifier(trained):
    return RKMSignalClassifier.from_pretrained(trained[0])


def test_a_known_filter_is_learnt(trained):
    assert float(trained[1].entries("valid")[-1]["valid_accuracy"]) > 99


def test_the_learned_filters_show_the_waves_frequencies(classifier):
    filters = classifier.model.filters()
    strengths = filters.square().sum((0, 1, 3))
    assert strengths.argmax() == WAVE, "the channel that has the wave"
    spectra = torch.fft.rfft(filters[:, :, WAVE], n=200, dim=-1).abs().square().sum((0, 1))
    frequencies = torch.fft.rfftfreq(200, 1 / RATE)
    for wanted in CLASSES.values():
        near = (frequencies - wanted).abs() < 2
        between = (frequencies - 35).abs() < 12
        assert spectra[near].mean() > 5 * spectra[between].mean()
    assert min(abs(float(frequencies[spectra.argmax()]) - wanted) for wanted in CLASSES.values()) < 2


def test_fairseq_validate_confusion_and_predict_agree(trained, data, classifier, test_file, capsys):
    result = succeed("validate", data, *TASK, "--path", trained[0] / "checkpoint_best.pt", "--batch-size", 7,
                     "--valid-subset", "test")  # fmt: skip
    accuracy = float(re.findall(r'"test_accuracy": "([\d.]+)"', result.output)[-1])
    matrix = classifier.confusion("test")
    assert matrix.sum() == 200
    assert torch.equal(matrix, classifier.confusion("test", batch_size=3))
    assert accuracy == pytest.approx(100 * matrix.trace().item() / 200, abs=0.06)
    predict.main(["--cpu", "--path", str(trained[0] / "checkpoint_best.pt"), "--windows", str(test_file)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2:] for line in lines[:5]] == [["1", "0"], ["1", "0.3"], ["1", "0.6"], ["1", "0.9"], ["2", "0"]]
    wanted = np.load(test_file)["y"]
    right = np.mean([label == wanted[int(number) - 1] for label, _, number, _ in lines])
    assert 100 * right == pytest.approx(accuracy, abs=0.06)


def test_the_scores_of_a_run_are_those_of_its_test_part(trained, data, classifier, capsys):
    signal_scores.main([str(trained[0]), str(data), "--cpu"])
    matrix = classifier.confusion("test")
    assert f"test accuracy {100 * matrix.trace() / matrix.sum():.2f}%" in capsys.readouterr().out
    result = json.loads((trained[0] / "result.json").read_text())
    assert result["folds"][0]["confusion"] == matrix.tolist()
    assert result["folds"][0]["recordings"] == 50
    assert (result["model"], result["ngram"], result["classes"]) == ("rkm_lstm", 40, ["alpha", "beta"])
    with np.load(trained[0] / "filters.npz") as held:
        assert np.array_equal(held["filters"], classifier.model.filters().numpy())


def test_a_line_a_recording(trained, test_file, classifier, capsys):
    checkpoint = str(trained[0] / "checkpoint_best.pt")
    predict.main(["--cpu", "--path", checkpoint, "--batch-size", "3", str(test_file)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    arrays = np.load(test_file)
    found = classifier.predict(arrays["x"])
    assert [line[0] for line in lines] == [prediction.label for prediction in found]
    assert np.mean([line[0] == label for line, label in zip(lines, arrays["y"], strict=True)]) > 0.99
    assert [float(line[1]) for line in lines] == pytest.approx([p.probability for p in found], abs=1e-4)


def test_predictions_do_not_depend_on_the_batch_or_the_other_recordings(classifier):
    arrays = waves(9, steps=230, seed=8)
    pieces = [x[:, :steps] for x, steps in zip(arrays["x"], range(120, 230, 12), strict=False)]
    together = classifier.probabilities(pieces, batch_size=5)
    alone = torch.cat([classifier.probabilities([piece], batch_size=1) for piece in pieces])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.sum(1), torch.ones(9))
    assert classifier.predict([]) == []
    assert torch.equal(classifier.probabilities(torch.from_numpy(arrays["x"])), classifier.probabilities(arrays["x"]))


def test_an_estimator_of_scikit_learn(classifier, test_file, trained):
    arrays = np.load(test_file)
    x, y = arrays["x"], arrays["y"]
    estimator = SignalEstimator(trained[0])
    assert estimator.predict_proba(x).shape == (50, 2)
    assert (estimator.classes_[estimator.predict_proba(x).argmax(1)] == estimator.predict(x)).all()
    score = estimator.score(x, y)
    assert score > 0.99
    assert clone(estimator) is estimator
    scaled = make_pipeline(FunctionTransformer(lambda z: z / 2), estimator)
    assert scaled.fit(2 * x, y).score(2 * x, y) == score, "a pipeline does not train it anew"
    assert cross_val_score(SignalEstimator(classifier), x, y, cv=2).mean() == pytest.approx(score)
    with pytest.raises(RKMError, match="knows the classes alpha, beta, and not gamma"):
        estimator.fit(x, np.array(["gamma"] * len(x)))


def test_a_run_that_was_cut_off_goes_on_to_the_same_end(data, folder, trained):
    cut = folder / "cut"
    succeed("train", data, *SMALL, "--max-epoch", 2, "--save-dir", cut)
    succeed("train", data, *SMALL, "--max-epoch", 4, "--save-dir", cut)
    models = [torch.load(run / "checkpoint_last.pt", weights_only=True)["model"] for run in (trained[0], cut)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_hydra_takes_all_flags(data, tmp_path):
    flags = hydra_flags(data, tmp_path)
    text = (tmp_path / "small.yaml").read_text()
    text = re.sub(r"task: .*", f"task: {{_name: signal_classification, data: {data}, no_shuffle: true}}", text)
    text = re.sub(r"criterion: .*", "criterion: {_name: sentence_prediction}", text)
    model = (
        "model: {_name: rkm_signal_classifier, cell: linear_kernel_gated, ngram: 40, ngram_padding: same, "
        "encoder_hidden_size: 4, encoder_layers: 2, encoder_bidirectional: true, pooling: attention, "
        "classifier_hidden_size: 0, dropout: 0.1, dropout_hidden: 0.1, dropout_weights: 0.1, dropout_channels: 0.1, "
        "noise: 0.1, time_masks: 2, time_mask_steps: 9}"
    )
    (tmp_path / "small.yaml").write_text(re.sub(r"model: .*", model, text))
    assert "done training" in succeed("hydra_train", *flags).output


def test_mistakes_with_a_trained_classifier(trained, data, tmp_path, classifier, test_file):
    checkpoint = trained[0] / "checkpoint_best.pt"
    arrays = dict(np.load(test_file))

    def changed(name, **changes):
        return write_npz(tmp_path / f"{name}.npz", **{**arrays, **changes})

    missing = arrays["x"].copy()
    missing[1, 2, 30] = np.nan
    for arguments, message in (
        (["--path", trained[0] / "none.pt", test_file], "no checkpoint at"),
        (["--path", checkpoint, tmp_path / "none.npz"], "no file of recordings at"),
        (["--path", checkpoint, changed("a", x=arrays["x"][:, :2], channels=["Cz", "Pz"])],
         "has 2 channels, and the model 3"),
        (["--path", checkpoint, changed("b", rate=50.0)], "has 50 samples a second, and the model 100"),
        (["--path", checkpoint, changed("c", channels=["Cz", "Pz", "Fz"])], "'Fz' where the model has 'Oz'"),
        (["--path", checkpoint, changed("d", x=missing)], "recording 2, channel 'Oz', 0.300 s .step 31.: missing"),
        (["--path", checkpoint, changed("e", x=arrays["x"][..., :99])], "recording 1 has 99 steps, fewer than"),
        (["--path", checkpoint, test_file, "--rate", 99], "has 100 samples a second, not --rate 99"),
        (["--path", checkpoint, test_file, "--data", tmp_path], r"no .*signals\.json"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=f"(?s)fairseq-rkm: error: .*{message}"):
            predict.main(["--cpu", *map(str, arguments)])
    for flags in (["--windows"], ["--rate", "5"], ["--input", "texts", str(test_file)]):
        with pytest.raises(SystemExit, match="2"):
            predict.main(["--path", str(checkpoint), *flags])
    with pytest.raises(RKMError, match=r"cannot .*classify documents|classify documents"):
        RKMClassifier.from_pretrained(trained[0])
    for given, message in (
        (arrays["x"][0, 0], "must have the axes"),
        ("file.npz", "read a file with read_signals first"),
        ([arrays["x"][0], arrays["x"][0, 0]], "recording 2 must have the axes"),
        (arrays["x"].astype(object), "must hold real numbers, not object"),
    ):
        with pytest.raises(RKMError, match=message):
            classifier.predict(given)
    with pytest.raises(RKMError, match="has 50 samples a second, and the model 100"):
        classifier.predict(arrays["x"], rate=50)
    with pytest.raises(RKMError, match="batch size must be at least 1"):
        classifier.predict(arrays["x"], batch_size=0)


def test_a_checkpoint_with_its_preparation_beside_it_needs_no_data(trained, data, tmp_path, classifier):
    shutil.copy(data / "signals.json", tmp_path)
    shutil.copy(trained[0] / "checkpoint_best.pt", tmp_path)
    x = waves(4, steps=120)["x"]
    assert RKMSignalClassifier.from_pretrained(tmp_path).predict(x) == classifier.predict(x)
