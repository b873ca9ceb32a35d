"""When layers run side by side, by the estimates for an H200: no GPU needed."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm import CELLS
from fairseq_rkm.ops import dispatch, wavefront_plan
from fairseq_rkm.ops.backends.blockwise import blockwise, blockwise_stretches
from fairseq_rkm.ops.stretches import Way
from fairseq_rkm.ops.wavefront_plan import GAIN, NUMBERS, Plan, Times, choose, time_in_order, time_side_by_side

H200 = SimpleNamespace(major=9, multi_processor_count=132, shared_memory_per_block_optin=232_448)
CELL = CELLS["rkm_lstm"]


@given(
    steps=st.integers(1, 100_000), layers=st.integers(2, 40), rows=st.integers(1, 8), beside=st.integers(2, 132),
    time=st.floats(0.5, 20), plain=st.floats(0.5, 20), host=st.booleans(),
)  # fmt: skip
def test_it_is_never_slower_by_estimate_and_bounded(steps, layers, rows, beside, time, plain, host):
    way = Way(rows, beside, time)
    choice = choose(steps, layers, [way], plain, host)
    in_order = time_in_order(steps, layers, plain)
    if choice is None:
        return
    number, taken = choice
    assert taken == way
    assert 2 <= number <= 32
    assert steps / number >= wavefront_plan.LEAST_STEPS
    given = time_side_by_side(steps, layers, way, number)
    assert (given.longer if host else given.gpu) <= GAIN * (in_order.longer if host else in_order.gpu)


def test_the_estimate_counts_stretches_and_layers():
    way = Way(1, 8, 2.0)
    one = 1000 / 4 * 2.0 + wavefront_plan.STRETCH_ON_GPU
    assert time_side_by_side(1000, 2, way, 4).gpu == 5 * one
    # 3 layers, 2 at a time: 12 pieces in pairs, and one more turn in which the second lane has yet to begin.
    assert time_side_by_side(1000, 3, way._replace(beside=2), 4).gpu == 7 * one
    assert time_in_order(1000, 3, 2.0).gpu == 3 * (2000 + wavefront_plan.STRETCH_ON_GPU)
    assert time_side_by_side(1000, 2, way, 4).host < time_side_by_side(1000, 2, way, 6).host
    assert Times(2.0, 3.0).longer == 3.0


def test_long_sequences_of_small_layers_run_side_by_side_and_short_ones_in_order():
    ways = [Way(1, 8, 1.6)]
    for host in (False, True):
        assert choose(1000, 2, ways, 1.6, host) is not None
        assert choose(20, 2, ways, 1.6, host) is None
    assert choose(100, 2, ways, 1.6, host=True) is None, "the host binds"
    graph, eager = (choose(1000, 4, ways, 1.6, host)[0] for host in (False, True))
    assert graph > eager, "a graph's launches cost the host nothing"
    assert choose(1000, 2, [], 1.6, host=False) is None
    assert choose(1000, 2, ways, 0.5, host=False) is None, "another backend is faster in order"
    assert choose(1000, 2, [Way(2, 2, 4.0), *ways], 1.6, host=False)[1] == ways[0]


@given(steps=st.integers(1, 300), number=st.integers(1, 40))
def test_stretches_cover_all_steps_once(steps, number):
    bounds = Plan(number, None, 2, None).bounds(steps)
    assert [t for start, stop in bounds for t in range(start, stop)] == list(range(steps))
    assert len(bounds) <= number


class Inputs(SimpleNamespace):
    """Inputs that only have a shape."""

    def size(self, at):
        return self.shape[at]

    def numel(self):
        return 1

    def element_size(self):
        return self.dtype.itemsize


def inputs(steps=1000, batch=16, dtype=torch.float32):
    device = SimpleNamespace(index=0, type="cuda")
    return Inputs(shape=(steps, batch, 64), dtype=dtype, is_cuda=True, device=device)


@pytest.fixture
def h200(monkeypatch):
    """Have ``blockwise`` believe in an H200, alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: H200)
    monkeypatch.setattr(blockwise.nvrtc, "available", lambda: None)
    for name in ("_room", "_rows_for"):
        monkeypatch.setattr(blockwise, name, getattr(blockwise, name).__wrapped__)
    monkeypatch.setattr(blockwise_stretches, "_room", blockwise._room)
    monkeypatch.setattr(dispatch, "pick", lambda *_: dispatch.BACKENDS["blockwise"])
    monkeypatch.setattr(wavefront_plan, "_MADE", {})
    monkeypatch.setattr(blockwise_stretches, "LOADED", set())


@pytest.mark.usefixtures("h200")
def test_plans_for_an_h200(monkeypatch):
    def plan(steps=2000, batch=16, layers=2, size=64, dtype=torch.float32, **options):
        options = {"backend": "auto", "cell": CELL, "mask": False, **options}
        return wavefront_plan.plan_for(x=inputs(steps, batch, dtype), layers=layers, size=size, **options)

    assert plan().chunks in NUMBERS
    assert (plan().rows, plan().lanes, plan().stretches) == (1, 2, blockwise_stretches.STRETCHES)
    assert plan(layers=20).lanes == wavefront_plan.MOST_LANES
    assert plan(layers=4, size=128, dtype=torch.bfloat16) is not None
    assert plan(steps=10) is None
    assert plan(steps=1000) is None, "the host would take longer"
    assert plan(steps=1000, layers=4) is not None
    assert plan(batch=2000) is None, "one layer fills the GPU"
    assert plan(size=63) is None, "its rows are copied for products"
    assert plan(size=132) is None, "no block holds it"
    assert plan(backend="stepwise") is None
    assert plan(cell=CELLS["cnn"]) is None
    assert plan(chunks=5).chunks == 5
    assert plan(layers=1) is None


@pytest.mark.usefixtures("h200")
def test_a_graph_takes_only_kernels_that_are_loaded():
    def plan(mask=False):
        return wavefront_plan.plan_for("auto", CELL, inputs(), 2, 64, mask, recorded=True)

    assert plan() is None
    for direction in ("forward", "backward"):
        blockwise_stretches.LOADED.add((direction, CELL, 64, torch.float32, 2, False, 0, 1))
    assert plan().rows == 2
    assert plan(mask=True) is None
