"""``examples/signals/prepare.py``, in this process."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from signal_samples import waves, write_npz

from fairseq_rkm import RKMError
from fairseq_rkm.data.signals import SignalPreparation, open_split, read_signals
from fairseq_rkm.experiments import signal_data
from fairseq_rkm.models.signals import RKMSignalClassifier, RKMSignalClassifierConfig
from fairseq_rkm.models.signals.signal_hub import SignalHubInterface


def prepare(*arguments: object) -> None:
    signal_data.main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        prepare(*arguments)
    return str(end.value) if isinstance(end.value.code, str) else capsys.readouterr().err


@pytest.fixture
def train(tmp_path):
    return write_npz(tmp_path / "train.npz", **waves(40))


def test_an_archive_s_own_parts(train, tmp_path, capsys):
    test = write_npz(tmp_path / "test.npz", **waves(6, steps=150, seed=1))
    prepare("--train", train, "--test", test, "--window", "500ms", "--stride", "250ms", "--out", tmp_path / "data")
    out = capsys.readouterr().out
    assert "test: 6 recordings of 3 groups, 30 windows" in out
    assert "3 channels at 100 Hz; windows of 50 steps, one every 25" in out
    preparation = SignalPreparation.load(tmp_path / "data")
    parts = {name: open_split(tmp_path / "data", name, 3, 2) for name in ("train", "valid", "test")}
    assert {name: len(part.starts) for name, part in parts.items()} == {"train": 108, "valid": 12, "test": 30}
    assert (preparation.classes, preparation.window, preparation.stride) == (["alpha", "beta"], 50, 25)
    assert np.allclose(parts["train"].values.mean(0), 0, atol=1e-4), "the scales are of the training part"
    assert np.allclose(parts["train"].values.std(0), 1, atol=1e-4)
    assert not np.allclose(parts["test"].values.mean(0), 0, atol=1e-4), "and of it alone"
    raw = waves(6, steps=150, seed=1)["x"][0].T
    assert np.allclose(parts["test"].values[:150], (raw - preparation.mean) / preparation.deviation, atol=1e-4)


def test_scales_do_not_depend_on_the_other_parts(tmp_path):
    arrays = waves(40)
    held = arrays["group"] == "p0"
    for name, factor in (("one", 1.0), ("two", 100.0)):
        changed = {**arrays, "x": np.where(held[:, None, None], factor * arrays["x"], arrays["x"])}
        source = write_npz(tmp_path / f"{name}.npz", **changed)
        prepare("--train", source, "--leave-out", "p0", "--out", tmp_path / name)
    one, two = (SignalPreparation.load(tmp_path / name) for name in ("one", "two"))
    assert one == two


def test_a_group_left_out(train, tmp_path, capsys):
    prepare("--train", train, "--leave-out", "p2", "--resample", "50Hz", "--out", tmp_path / "data")
    out = capsys.readouterr().out
    assert "test: 10 recordings of 1 groups" in out
    assert "valid: 10 recordings of 1 groups" in out
    assert SignalPreparation.load(tmp_path / "data").rate == 50
    assert open_split(tmp_path / "data", "test", 3, 2).lengths.tolist() == [50] * 10


def test_predictions_are_whitened_as_the_prepared_parts_are(tmp_path):
    source = write_npz(tmp_path / "long.npz", **waves(16, steps=300))
    prepare("--train", source, "--leave-out", "p2", "--whiten", "group", "--window", "1s", "--out", tmp_path / "data")
    preparation = SignalPreparation.load(tmp_path / "data")
    assert preparation.whiten == "group"
    test = read_signals(source)
    held = test.subset([i for i, group in enumerate(test.groups) if group == "p2"])
    wanted = open_split(tmp_path / "data", "test", 3, 2)
    found = [preparation.standardized(signal) for signal in preparation.fitted(held).signals]
    assert np.allclose(np.concatenate(found), wanted.values, atol=1e-5)

    model = RKMSignalClassifier.build_model(
        OmegaConf.structured(RKMSignalClassifierConfig(ngram=3)), SimpleNamespace(preparation=preparation)
    )
    model.register_classification_head("head", 2)
    task = SimpleNamespace(preparation=preparation, cfg=SimpleNamespace(classification_head_name="head"))
    hub = SignalHubInterface(task, model)
    x = [signal.T for signal in held.signals]
    windows = hub.windows(x, groups=held.groups)
    pieces = [torch.from_numpy(wanted.values[at : at + n].copy())
              for at, n in zip(wanted.starts, wanted.lengths, strict=True)]  # fmt: skip
    assert torch.allclose(windows.probabilities, hub.classified(pieces), atol=1e-5)
    assert [one.label for one in hub.predict(x, groups=["p2"] * 4)] == [one.label for one in hub.predict(held)]
    with pytest.raises(RKMError, match="the array has no groups, and signals are whitened by group"):
        hub.predict(x)


def test_random_parts_and_dropped_channels(train, tmp_path, capsys):
    prepare("--train", train, "--drop-channels", "Cz", 3, "--out", tmp_path / "data")
    captured = capsys.readouterr()
    assert "test: 8 recordings of" in captured.out
    assert "--split group keeps them apart" in captured.err
    preparation = SignalPreparation.load(tmp_path / "data")
    assert (preparation.channels, preparation.dropped) == (["Pz"], [0, 2])


def changed(path, **changes):
    return write_npz(path, **{**waves(40), **changes})


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        (
            {"x": np.where(np.arange(100) == 5, np.nan, waves(40)["x"])},
            [],
            "120 values are missing .*\n.*recording 1, ",
        ),
        ({"x": waves(40)["x"] * [[1], [0], [1]]}, [], "channel 'Pz' is constant in the training part"),
        ({"y": ["a"] * 40}, [], "all training recordings are of the class 'a'"),
        ({"group": waves(40)["y"]}, ["--leave-out", "alpha"], "2 of 2 groups have one class only"),
        ({}, ["--window", "2s"], "recording 1 has 100 steps, fewer than a window of 200 steps"),
        ({}, ["--rate", 50], "has 100 samples a second, not --rate 50"),
        ({}, ["--stride", 5], "--stride is from one window to the next"),
        ({}, ["--whiten", "group"], "recording 1 has 100 steps, and whitening needs 256"),
        ({}, ["--resample", "x"], "--resample takes samples a second"),
        ({}, ["--drop-channels", "Fz"], "has no channel 'Fz'; its channels are Cz, Pz, Oz"),
        ({}, ["--drop-channels", 1, 2, 3], "no channel is left"),
        ({}, ["--leave-out", "p9"], "there is no group 'p9'"),
        ({}, ["--split", "random", "--leave-out", "p1"], "--leave-out is for --split group"),
        ({}, ["--valid-fraction", 1.5], "--valid-fraction must lie within"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_prepared_leaves_a_sentence_and_no_folder(tmp_path, capsys, changes, flags, sentence):
    source = changed(tmp_path / "a.npz", **changes)
    said = refused(capsys, "--train", source, *flags, "--out", tmp_path / "data")
    assert re.search(sentence, said), said
    assert not (tmp_path / "data").exists()


def test_a_test_part_that_does_not_fit(train, tmp_path, capsys):
    for changes, sentence in (
        (
            {"y": ["gamma"] * 40},
            "recording 1 in the test part is of the class 'gamma', which no training recording has",
        ),
        ({"rate": 50.0}, "has 50 samples a second, and .* 100"),
        ({"x": waves(40)["x"][:, :2], "channels": ["Cz", "Pz"]}, "has 2 channels, and .* 3"),
    ):
        test = changed(tmp_path / "test.npz", **changes)
        said = refused(capsys, "--train", train, "--test", test, "--out", tmp_path / "data")
        assert re.search(sentence, said), said
    (tmp_path / "data").mkdir()
    assert "is there already" in refused(capsys, "--train", train, "--out", tmp_path / "data")
