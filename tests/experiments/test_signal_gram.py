import json

import numpy as np
import pytest

from fairseq_rkm.data.signals import Recordings
from fairseq_rkm.experiments import signal_gram, signal_sets


def recordings(count, seed):
    """Two classes of one mean and one spread: a rising and a falling signal, of several lengths."""
    draw = np.random.default_rng(seed)
    signals, labels = [], []
    for number in range(count):
        ramp = np.linspace(-1, 1, 8 + number % 3) * (1 if number % 2 else -1)
        signals.append((ramp[:, None] + 0.1 * draw.standard_normal((len(ramp), 2))).astype(np.float32))
        labels.append("up" if number % 2 else "down")
    return Recordings(f"set {seed}", signals, labels)


@pytest.fixture(autouse=True)
def _small_set(monkeypatch):
    def read(_data):
        return recordings(60, 1), recordings(20, 2)

    monkeypatch.setitem(signal_sets.SETS, "BasicMotions", signal_sets.SignalSet(read))


def test_the_order_of_steps_tells_classes_apart_and_means_do_not(tmp_path, capsys):
    out = tmp_path / "gram.json"
    flags = ["--kernels", "linear", "gaussian", "--poolings", "last", "mean", "--sigma-f2", "0.9", "0"]
    signal_gram.main(["--datasets", "BasicMotions", *flags, "--out", str(out)])
    result = json.loads(out.read_text())
    accuracy = {row["model"]: row["accuracy"] for row in result["rows"]}
    assert len(accuracy) == 1 + 2 * 2 * 2
    assert accuracy["logistic regression"] < 80
    assert accuracy["gaussian kernel, last, s_f = 0.9"] == 100
    assert accuracy["linear kernel, mean, s_f = 0"] < 80
    assert result["flags"]["datasets"] == "['BasicMotions']"
    assert "BasicMotions, gaussian kernel, last, s_f = 0.9" in capsys.readouterr().out


def test_a_kernel_s_refusal_is_a_sentence():
    with pytest.raises(SystemExit, match="gram: error: the degree of the kernel 'polynomial' must be"):
        signal_gram.main(["--datasets", "BasicMotions", "--kernels", "polynomial", "--degree", "99"])


def test_groups_are_counted_from_one(capsys):
    with pytest.raises(SystemExit):
        signal_gram.main(["--groups", "0"])
    assert "--groups must be at least 1, not 0" in capsys.readouterr().err
