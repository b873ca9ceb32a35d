import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fairseq.trainer import Trainer
from helpers import DEVICES
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm.fairseq_patches import late_readings
from fairseq_rkm.fairseq_patches.late_readings import compare_norms_late, norm_an_update_late
from fairseq_rkm.optim.adamw_average import AveragedAdamWConfig, FairseqAveragedAdamW
from fairseq_rkm.optim.nt_asgd import FairseqNonMonotoneASGD, NonMonotoneASGDConfig

fairseq_rkm.register()


class StandIn(SimpleNamespace):
    """As much of a trainer as is asked for; hashable, as a trainer is."""

    __hash__ = object.__hash__


class Wrapped:
    """As ``FP16Optimizer`` holds the one that works in float32."""

    def __init__(self, inner, scaler=None):
        self.fp32_optimizer, self.scaler = inner, scaler


def adamw(params):
    config = AveragedAdamWConfig(lr=[0.1], max_update=100, task_name=None, average_last=0.5)
    return FairseqAveragedAdamW(OmegaConf.structured(config), params)


def nt_asgd(params):
    return FairseqNonMonotoneASGD(OmegaConf.structured(NonMonotoneASGDConfig(lr=[0.1], task_name=None)), params)


PLAIN = {adamw: partial(torch.optim.AdamW, lr=0.1, weight_decay=0), nt_asgd: partial(torch.optim.SGD, lr=0.1)}
"""The same updates by PyTorch's optimizers."""


def make_trainer(device, processes=1, build=adamw):
    params = [torch.nn.Parameter(torch.randn(3, 4, device=device)) for _ in range(2)]
    trainer = StandIn(
        optimizer=build(params), data_parallel_world_size=processes, data_parallel_rank=processes - 1,
        data_parallel_process_group=None, _grad_norm_buf=None,
    )  # fmt: skip
    return trainer, params


def update(trainer, params, gradient):
    """Clip at 1 and step; the norm that the trainer is shown."""
    for p in params:
        p.grad = torch.full_like(p, gradient)
    inner = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    shown = norm_an_update_late(lambda _, clip: inner.clip_grad_norm(clip))(trainer, 1.0)
    inner.step()
    return shown


def norm_of(gradient):
    return abs(gradient) * math.sqrt(24)


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(late_readings, "_is_on_gpu", lambda _: True)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("build", PLAIN)
def test_clipping_and_steps_are_not_late(device, half, build):
    trainer, params = make_trainer(device, build=build)
    if half:
        trainer.optimizer = Wrapped(trainer.optimizer)
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = PLAIN[build](plain)
    gradients = [0.01, 3.0, -2.0, 0.1]
    shown = [update(trainer, params, gradient) for gradient in gradients]
    assert [norm.item() for norm in shown] == pytest.approx([norm_of(g) for g in (0.01, 0.01, 3.0, -2.0)])
    for gradient in gradients:
        for p in plain:
            p.grad = torch.full_like(p, gradient)
        torch.nn.utils.clip_grad_norm_(plain, 1.0)
        other.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", PLAIN)
def test_an_update_that_is_not_finite_changes_no_weights_and_is_known_at_the_next(device, build):
    trainer, params = make_trainer(device, build=build)
    update(trainer, params, 0.5)
    before = [p.detach().clone() for p in params]
    assert update(trainer, params, float("nan")).isfinite()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not update(trainer, params, 0.5).isfinite()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.usefixtures("as_on_gpu")
def test_not_with_loss_scaling_nor_with_other_optimizers():
    scaled, params = make_trainer("cpu")
    scaled.optimizer = Wrapped(scaled.optimizer, scaler=object())
    assert [update(scaled, params, g).item() for g in (1.0, 2.0)] == pytest.approx([norm_of(1), norm_of(2)])
    trainer = StandIn(optimizer=object(), data_parallel_world_size=1)
    assert norm_an_update_late(lambda *_: torch.tensor(7.0))(trainer, 1.0) == 7
    sharded, params = make_trainer("cpu")
    sharded.optimizer._optimizer = torch.optim.SGD(params, 0.1)  # as --zero-sharding wraps ours
    assert [update(sharded, params, g).item() for g in (1.0, 2.0)] == pytest.approx([norm_of(1), norm_of(2)])


def others_norm(monkeypatch, norm):
    """Let this process have rank 1 of two, and rank 0 the norm that ``norm`` makes of this one's."""

    def all_reduce(norms, group):
        assert norms.tolist()[0] == 0
        norms[0] = norm(norms[1])

    monkeypatch.setattr(late_readings.distributed_utils, "all_reduce", all_reduce)


def compared(trainer, shown):
    """Whether the trainer's own comparison was left out."""
    called = []
    compare_norms_late(lambda *_: called.append(True))(trainer, shown)
    return not called


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mine", [False, True])
def test_a_norm_that_is_not_finite_in_one_process_is_known_to_all(monkeypatch, bad, mine):
    trainer, params = make_trainer("cpu", processes=2)
    others_norm(monkeypatch, lambda norm: norm)
    assert [update(trainer, params, g).item() for g in (0.5, 2.0, 1.0)] == pytest.approx(
        [norm_of(g) for g in (0.5, 0.5, 2)]
    )
    before = [p.detach().clone() for p in params]
    others_norm(monkeypatch, lambda _: 1.0 if mine else bad)
    shown = update(trainer, params, bad if mine else 1.0)
    assert shown.item() == pytest.approx(norm_of(1))
    assert compared(trainer, shown)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    others_norm(monkeypatch, lambda norm: norm)
    shown = update(trainer, params, 1.0)
    assert not shown.isfinite()
    assert compared(trainer, shown), "the trainer ends the run for this process's norm, as in one process"


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize(("factor", "alike"), [(1 + 1e-7, True), (1 + 1e-5, False), (1 - 1e-5, False)])
def test_norms_that_differ_change_no_weights_and_reach_the_trainers_comparison(monkeypatch, factor, alike):
    trainer, params = make_trainer("cpu", processes=2)
    others_norm(monkeypatch, lambda norm: norm)
    update(trainer, params, 0.5)
    before = [p.detach().clone() for p in params]
    others_norm(monkeypatch, lambda norm: norm * factor)
    assert compared(trainer, update(trainer, params, 1.0))
    assert torch.equal(params[0], before[0]) != alike
    others_norm(monkeypatch, lambda norm: norm)
    assert compared(trainer, update(trainer, params, 1.0)) == alike


@pytest.mark.parametrize(("norms", "message"), [((1.0, 2.0), "inconsistent"), ((math.nan, 1.0), "Nan/Inf")])
def test_divergence_is_told_from_difference(norms, message):
    """As the trainer compares norms at once, with another optimizer."""
    trainer = StandIn(_grad_norm_buf=torch.tensor(norms))

    def check(*_):
        raise FloatingPointError("gradients are inconsistent between workers")

    with pytest.raises(FloatingPointError, match=message):
        compare_norms_late(check)(trainer, torch.tensor(norms[0]))


def test_the_trainer_is_shown_it_once():
    assert not hasattr(Trainer.clip_grad_norm.__wrapped__, "__wrapped__")
    fairseq_rkm.register()
    assert not hasattr(Trainer.clip_grad_norm.__wrapped__, "__wrapped__")
