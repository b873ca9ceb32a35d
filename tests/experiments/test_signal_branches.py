"""Folds as branches of a graph, on a CPU with a stand-in for recording, and on a GPU as it is."""

import pytest
import torch

from fairseq_rkm import RKMError
from fairseq_rkm.experiments import signal_folds
from fairseq_rkm.experiments.signal_baselines import PlainLSTM
from fairseq_rkm.experiments.signal_branches import Branches
from fairseq_rkm.experiments.signal_folds import Training, train_folds

from .test_signal_folds import CPU, builder, experiment


def test_steps_run_once_as_they_are_and_are_then_recorded_and_replayed():
    state, calls = torch.zeros(2), []

    def step(number):
        def run():
            state[number] += number + 1
            return state[number : number + 1].clone()

        return run

    def recording(run, _pool):
        calls.append("recorded")
        return lambda: (calls.append("replayed"), run())[1]

    branches = Branches([step(0), step(1)], CPU, recording)
    assert [branches().tolist() for _ in range(3)] == [[1, 2], [2, 4], [3, 6]]
    assert calls == ["recorded", "replayed", "replayed"]


def test_steps_that_cannot_be_recorded_go_on_with_a_note(capsys):
    def recording(_run, _pool):
        raise RKMError("a CUDA graph could not be recorded (here)")

    branches = Branches([lambda: torch.ones(1)], CPU, recording)
    assert [branches().item() for _ in range(3)] == [1, 1, 1]
    assert capsys.readouterr().out.count("could not be recorded (here); the folds are trained without it") == 1


@pytest.mark.parametrize(
    ("flags", "apart"),
    [({}, True), ({"cell": "cnn"}, True), ({"encoder_hidden_size": 300}, False), ({"layer_norm": True}, False),
     ({"cell": "gated_cnn", "encoder_hidden_size": 300}, True)],
)  # fmt: skip
def test_only_models_that_leave_room_run_beside_each_other(flags, apart):
    _, windows, _ = experiment()
    assert signal_folds._leaves_room(builder(windows, **flags)()) == apart
    assert not signal_folds._leaves_room(PlainLSTM(3, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("cell", ["rkm_lstm", "linear_kernel", "gated_cnn"])
def test_on_a_gpu_folds_are_trained_as_on_a_cpu(cell, lengths, capsys):
    _, windows, folds = experiment(lengths)
    build = builder(windows, cell=cell)
    training = Training(epochs=3, lr=0.01, batch_size=6)
    here = train_folds(build, windows, folds, training, 1, CPU)
    there = train_folds(build, windows, folds, training, 1, torch.device("cuda"))
    assert "could not be recorded" not in capsys.readouterr().out
    assert torch.allclose(here.losses, there.losses, atol=1e-2)
    for one, other in zip(here.probabilities, there.probabilities, strict=True):
        assert torch.allclose(one, other, atol=2e-2)
