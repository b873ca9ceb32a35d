"""``auto`` against what an H200 took for each backend: no GPU needed."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fairseq_rkm import CELLS
from fairseq_rkm.experiments.sweep_measurement import PRECISIONS
from fairseq_rkm.ops import BACKENDS, dispatch
from fairseq_rkm.ops.backends.blockwise import blockwise
from fairseq_rkm.ops.backends.persistent import persistent, plan
from fairseq_rkm.ops.weights import Weights

RECORDED = json.loads(Path(__file__).with_name("recorded_plans.json").read_text(encoding="utf-8"))["rows"]
H200 = SimpleNamespace(major=9, multi_processor_count=132, shared_memory_per_block_optin=232_448)
ROOM = ((1, 132), (2, 132), (4, 128), (8, 120))
GPU = ("blockwise", "persistent", "stepwise")


@pytest.fixture
def h200(monkeypatch):
    """Have backends believe in an H200."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: H200)
    monkeypatch.setattr(plan, "_room", lambda _device: ROOM)
    monkeypatch.setattr(blockwise, "_room", blockwise._room.__wrapped__)
    monkeypatch.setattr(blockwise, "_rows_for", blockwise._rows_for.__wrapped__)
    monkeypatch.setattr(persistent, "plan_for", plan.plan_for.__wrapped__)


def problem(size, batch, dtype, norm=False):
    """Inputs and weights that only have shapes."""
    inputs = SimpleNamespace(
        is_cuda=False, dtype=dtype, device=SimpleNamespace(index=0), size=lambda at: (64, batch, size)[at]
    )
    shape = SimpleNamespace(size=lambda at: (4 * size, size)[at])
    return inputs, Weights(shape, shape, norm_weight=shape if norm else None)


def fastest(precision, size, batch, backends, norm=False):
    """The backend of the lowest estimate, as ``auto`` takes it."""
    inputs, weights = problem(size, batch, PRECISIONS[precision][0], norm)
    return min(backends, key=lambda name: BACKENDS[name].step_time(CELLS["rkm_lstm"], inputs, weights))


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("precision", "size", "times"),
    [
        ("bfloat16", 512, {"persistent": 1.41, "stepwise": 2.62}),
        ("bfloat16", 1024, {"persistent": 3.79, "stepwise": 3.43}),
        ("tf32", 512, {"persistent": 2.16, "stepwise": 3.66}),
        ("tf32", 1024, {"persistent": 6.80, "stepwise": 4.69}),
    ],
)
def test_auto_takes_the_faster_with_layer_normalisation(precision, size, times):
    """Milliseconds of graphs, T 128, B 64, on an H200; those of ``stepwise`` with a polynomial: no less."""
    assert fastest(precision, size, 64, times, norm=True) == min(times, key=times.get)


@pytest.mark.slow
@pytest.mark.usefixtures("h200")
def test_auto_is_never_a_tenth_slower_than_the_best_backend():
    chosen = set()
    for precision, size, batch, times in RECORDED:
        name = fastest(precision, size, batch, times)
        chosen.add(name)
        assert times[name] <= 1.1 * min(times.values()), (precision, size, batch, name, times)
    assert chosen == set(GPU)
    assert len(RECORDED) > 100


def test_auto_asks_backends_for_estimates_in_order(monkeypatch):
    asked = []

    def backend(name, time=None, refuses=None):
        return dispatch.Backend(None, lambda *_: refuses, True, time and (lambda *_: asked.append(name) or time))

    rows = {"a": backend("a", 3.0), "b": backend("b", 2.0), "c": backend("c", 1.0, "no"), "d": backend("d")}
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    assert dispatch.pick("auto", CELLS["rkm_lstm"], *problem(4, 1, torch.float32)) is rows["b"]
    assert asked == ["a", "b"]
    for order in itertools.permutations("cd"):
        monkeypatch.setattr(dispatch, "BACKENDS", {name: rows[name] for name in order})
        assert dispatch.pick("auto", CELLS["rkm_lstm"], *problem(4, 1, torch.float32)) is rows["d"]


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(("size", "batch", "few"), [(1150, 64, "persistent"), (1536, 512, "stepwise")])
def test_few_steps_go_where_the_host_has_less_to_do(size, batch, few, monkeypatch):
    """Unless the GPU would take much longer for them."""
    rows = {name: replace(BACKENDS[name], refuses=lambda *_: None) for name in ("persistent", "stepwise")}
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    given = problem(size, batch, torch.float32)
    assert dispatch.pick("auto", CELLS["rkm_lstm"], *given, None, True) is rows[few]
    assert dispatch.pick("auto", CELLS["rkm_lstm"], *given) is rows["stepwise"]


def test_a_choice_for_few_steps_is_not_one_for_many(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    monkeypatch.setattr(dispatch, "pick", lambda *given: asked.append(given[-1]) or dispatch.BACKENDS["batched"])
    weights = Weights(torch.zeros(16, 3), torch.zeros(16, 4))
    for steps in (16, 17, 2, 64, 1, 16):
        x = torch.zeros(steps, 2, 3)
        dispatch.picked("auto", CELLS["rkm_lstm"], x, weights)
        dispatch.proven("auto", CELLS["rkm_lstm"], x, weights, 4, None, None, None)
    assert asked == [True, True, False, False, True, True]
