from types import SimpleNamespace

import pytest
import torch
from fairseq.trainer import Trainer
from helpers import DEVICES
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm.fairseq_patches import late_readings
from fairseq_rkm.fairseq_patches.late_readings import LateLog, log_an_update_late, sum_without_waiting
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


class Task:
    summable = True

    @classmethod
    def logging_outputs_can_be_summed(cls, _criterion):
        return cls.summable


class TaskOfLists(Task):
    summable = False


def trainer_of_two(monkeypatch, optimizer=None, task=Task):
    """One of two processes; the other one has the same numbers."""
    config = OmegaConf.structured(AveragedAdamWConfig(lr=[0.1], task_name=None))
    ours = FairseqAveragedAdamW(config, [torch.nn.Parameter(torch.zeros(1))])
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(late_readings.distributed_utils, "all_reduce", lambda tensor, **_group: tensor.mul_(2))
    return StandIn(
        optimizer=optimizer or ours, task=task(), get_criterion=lambda: None, device=torch.device("cpu"),
        data_parallel_process_group=None,
    )  # fmt: skip


def fairseqs(*_args, **_kwargs):
    return "fairseq's"


def test_sums_over_processes_stay_on_the_gpu_in_one_call(monkeypatch):
    trainer = trainer_of_two(monkeypatch)
    outputs = [{"loss": torch.tensor(1.5), "ntokens": 3}, {"loss": torch.tensor(2.0), "ntokens": 4}]
    (summed,), (size, ooms, seconds) = sum_without_waiting(fairseqs)(trainer, outputs, 7.0, 1, 2.5)
    assert {key: value.item() for key, value in summed.items()} == {"loss": 7, "ntokens": 14}
    assert all(value.shape == () for value in summed.values())
    assert (ooms.item(), seconds.item()) == (2, 5)
    scale = 2 / (size or 1.0)
    assert (scale.item(), scale.dtype) == (pytest.approx(2 / 14), torch.float32)
    log = log_an_update_late(lambda _, outputs, sample_size, *_norm: (outputs, sample_size))
    logged, logged_size = log(trainer, [summed], size, 0.5)
    assert logged == [{"loss": 7.0, "ntokens": 14.0}]
    assert logged_size.item() == 14


def test_a_batch_that_stands_in_for_none_counts_nothing_and_divides_nothing_by_zero(monkeypatch):
    trainer = trainer_of_two(monkeypatch)
    (summed,), (size, *_) = sum_without_waiting(fairseqs)(
        trainer, [{"loss": torch.tensor(1.5)}], 0.0, 0, 1.0, ignore=True
    )
    assert summed["loss"].item() == 0
    assert (2 / (size or 1.0)).item() == 2


def test_a_process_without_memory_sums_as_many_numbers_as_the_others(monkeypatch):
    trainer, seen = trainer_of_two(monkeypatch), []
    aggregated = sum_without_waiting(fairseqs)
    with pytest.raises(MemoryError):
        aggregated(trainer, [], 0.0, 1, 1.0)
    aggregated(trainer, [{"loss": torch.tensor(1.5), "ntokens": 2}], 2.0, 0, 1.0)
    (summed,), _ = aggregated(trainer, [], 0.0, 1, 1.0)
    assert {key: value.item() for key, value in summed.items()} == {"loss": 0, "ntokens": 0}
    other = trainer_of_two(monkeypatch, optimizer=object())
    aggregated = sum_without_waiting(lambda _, outputs, *_rest, ignore: seen.append((outputs, ignore)))
    aggregated(other, [{"loss": 1.5}], 2.0, 0, 1.0)
    aggregated(other, [], 0.0, 1, 1.0)
    assert seen == [([{"loss": 1.5}], False), ([{"loss": 1.5}], True)]


@pytest.mark.parametrize(
    ("given", "outputs", "further"),
    [
        ({}, [{"loss": torch.tensor(1.0)}], (1.0,)),  # validation
        ({"task": TaskOfLists}, [{"loss": torch.tensor(1.0)}], (1.0, 0, 1.0)),
        ({"optimizer": object()}, [{"loss": torch.tensor(1.0)}], (1.0, 0, 1.0)),
        ({}, [{"scores": torch.zeros(3)}], (1.0, 0, 1.0)),
    ],
)
def test_all_else_is_summed_by_fairseq(monkeypatch, given, outputs, further):
    assert sum_without_waiting(fairseqs)(trainer_of_two(monkeypatch, **given), outputs, *further) == "fairseq's"


def test_the_trainer_logs_late():
    assert Trainer._reduce_and_log_stats.__wrapped__.__module__ == "fairseq.trainer"
