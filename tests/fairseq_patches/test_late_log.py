from types import SimpleNamespace

import pytest
import torch
from fairseq.trainer import Trainer
from helpers import DEVICES
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm.fairseq_patches import late_readings
from fairseq_rkm.fairseq_patches.late_readings import LateLog, log_an_update_late
from fairseq_rkm.optim.adamw_average import AveragedAdamWConfig, FairseqAveragedAdamW

fairseq_rkm.register()


class StandIn(SimpleNamespace):
    """As much of a trainer as is asked for; hashable, as a trainer is."""

    __hash__ = object.__hash__


def outputs(device, update):
    """Of two processes."""
    return [{"loss": torch.tensor(update + rank / 2, device=device), "ntokens": 10 * update + rank} for rank in (0, 1)]


@pytest.mark.parametrize("device", DEVICES)
def test_all_that_an_update_logs_comes_with_the_next(monkeypatch, device):
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    log = LateLog()
    for update, arriving in enumerate((0, 0, 1, 2)):
        given = log.exchange(outputs(device, update))
        assert given == [{"loss": arriving + rank / 2, "ntokens": 10 * arriving + rank} for rank in (0, 1)]
        assert all(type(output["loss"]) is float for output in given)


def test_what_may_change_its_keys_comes_with_them(monkeypatch):
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    log = LateLog()
    log.exchange([{"loss": torch.tensor(1.0)}])
    assert log.exchange([{"loss": torch.tensor(2.0), "ar": torch.tensor(3.0)}]) == [{"loss": 1.0}]
    assert log.exchange([{"loss": torch.tensor(4.0)}]) == [{"loss": 2.0, "ar": 3.0}]


def test_what_is_no_number_on_a_gpu_is_left_as_it_is(monkeypatch):
    log, given = LateLog(), outputs("cpu", 1)
    assert log.exchange(given) is given
    assert log.exchange([{"ntokens": 3}]) == [{"ntokens": 3}]
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    large = [{"loss": torch.tensor(1.0), "scores": torch.zeros(3)}]
    assert log.exchange(large) is large


@pytest.mark.parametrize("wrapped", [False, True])
def test_with_our_optimizers_training_is_logged_an_update_late_and_validation_at_once(monkeypatch, wrapped):
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    log = log_an_update_late(
        lambda _, outputs, sample_size, norm=None: {"loss": outputs[0]["loss"], "n": sample_size, "norm": norm}
    )
    config = OmegaConf.structured(AveragedAdamWConfig(lr=[0.1], task_name=None))
    ours = FairseqAveragedAdamW(config, [torch.nn.Parameter(torch.zeros(1))])
    trainer = StandIn(optimizer=SimpleNamespace(fp32_optimizer=ours) if wrapped else ours)

    def outputs(loss):
        return [{"loss": torch.tensor(loss)}]

    assert log(trainer, outputs(1.0), 5, 0.5) == {"loss": 1, "n": 5, "norm": 0.5}
    assert log(trainer, outputs(2.0), 6, 0.5) == {"loss": 1, "n": 6, "norm": 0.5}
    assert log(trainer, outputs(9.0), 7) == {"loss": 9, "n": 7, "norm": None}
    assert log(trainer, outputs(3.0), 8, 0.5) == {"loss": 2, "n": 8, "norm": 0.5}, "validation is no update"


def test_with_other_optimizers_nothing_is_late(monkeypatch):
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    log = log_an_update_late(lambda _, outputs, *_rest: {"loss": outputs[0]["loss"]})
    trainer = StandIn(optimizer=object())
    assert [log(trainer, [{"loss": torch.tensor(loss)}], 1, 0.5)["loss"] for loss in (1.0, 2.0)] == [1, 2]


def test_the_trainer_logs_late():
    assert Trainer._reduce_and_log_stats.__wrapped__.__module__ == "fairseq.trainer"
