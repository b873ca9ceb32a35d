"""``stepwise`` with one kernel a step against the reference: on a GPU or in Triton's interpreter."""

import itertools

import pytest
import torch
from helpers import assert_close

from fairseq_rkm import RKM
from fairseq_rkm.experiments.sweep_measurement import PRECISIONS, products_in
from fairseq_rkm.ops import CELLS
from fairseq_rkm.ops.backends.stepwise import estimate, joined_loop, step_loop
from fairseq_rkm.ops.backends.stepwise.estimate import step_time
from fairseq_rkm.ops.backends.stepwise.step_loop import STRETCHES
from ops.backends.feedback_kernels import DTYPES, FEEDBACK, SMALL, check_loops_are_shared, outcomes
from ops.backends.test_choice import problem
from ops.backends.triton_interpreter import DEVICE, INTERPRETED, run_interpreted, runs
from ops.test_backends import MISSING, check_missing_numbers_stay_where_they_are, clear_bound, compare

TF32 = not INTERPRETED
"""Whether float32 is compared with products in TF32: the ones over all steps are."""


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Have every step that can be one kernel be one; the launches of steps of both ways."""
    launched = {"joined": 0, "two": 0}

    def counted(cls, name):
        plain = cls.step

        def step(self, ahead):
            launched[name] += 1
            plain(self, ahead)

        monkeypatch.setattr(cls, "step", step)

    counted(joined_loop.JoinedLoop, "joined")
    counted(step_loop.StepLoop, "two")
    monkeypatch.setattr(joined_loop, "MOST_ROWS", dict.fromkeys(joined_loop.MOST_ROWS, joined_loop.LARGEST_BATCH))
    monkeypatch.setattr(joined_loop, "LEAST_UNITS", 1)
    step_loop.LOOPS.clear()
    yield launched
    step_loop.LOOPS.clear()


def check_all_are_joined(launched):
    assert launched["joined"] > 0
    assert launched["two"] == 0


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("cell", "dtype"), itertools.product(FEEDBACK, [torch.float32] if INTERPRETED else DTYPES)
)  # fmt: skip
def test_all_variants(cell, dtype, steps):
    for bidirectional, mask in ((False, "none"), (True, "mixed")):
        compare(
            "stepwise", device=DEVICE, dtype=dtype, cell=cell, mask=mask, bidirectional=bidirectional,
            learn_sigma=True, ngram=2, tf32=TF32, **SMALL,
        )  # fmt: skip
    check_all_are_joined(steps)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_dtypes_and_batches_in_the_interpreter_too(dtype, batch, steps):
    compare("stepwise", device=DEVICE, dtype=dtype, mask="mixed", tf32=TF32, steps=3, batch=batch, sizes=(3, 21))
    check_all_are_joined(steps)


@runs
@pytest.mark.usefixtures("poisoned")
def test_sequences_that_begin_anew_and_all_memories(steps):
    # Sequences that begin anew are rows of their own, and more than eight would not be joined.
    compare(
        "stepwise", device=DEVICE, dtype=torch.float32, cell="rkm_lstm", mask="mixed", tf32=TF32, reset=True,
        return_memory=True, steps=3, batch=2, sizes=(2, 5),
    )  # fmt: skip
    check_all_are_joined(steps)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
def test_clipped_memory(cell, steps):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    bound = clear_bound(cell, dtype=torch.float32, **shape)
    with products_in("float32"):  # rounded to TF32 a value could cross the bound
        compare("stepwise", device=DEVICE, dtype=torch.float32, cell=cell, memory_clip=bound, **shape)
    check_all_are_joined(steps)


@runs
def test_missing_numbers_stay_where_they_are(steps):
    check_missing_numbers_stay_where_they_are("stepwise", torch.float32, DEVICE, **MISSING[0])
    check_all_are_joined(steps)


@runs
@pytest.mark.parametrize(
    ("more", "batch"), [({"layer_norm": True}, 2), ({"kernel": "gaussian"}, 2), ({}, joined_loop.LARGEST_BATCH + 1)]
)
def test_other_layers_take_two_launches(more, batch, steps):
    RKM(3, 5, backend="stepwise", device=DEVICE, **more)(torch.randn(2, batch, 3, device=DEVICE))
    assert steps["joined"] == 0
    assert steps["two"] == 2


@runs
@pytest.mark.parametrize("batch", [1, 2])
def test_a_plan_changes_no_number(batch, monkeypatch):
    rkm = RKM(3, 33, backend="stepwise", device=DEVICE)
    x = torch.randn(3, batch, 3, device=DEVICE)
    wanted = outcomes(rkm, x)
    rows = step_loop.rows_for(batch, torch.float32, joined=True)
    for units, split in ((1, 2), (8, 1)):
        for backward in (False, True):
            monkeypatch.setitem(joined_loop.PLANS, (backward, rows, 33), joined_loop.Plan(4, units, split))
        step_loop.LOOPS.clear()
        for given, exact in zip(outcomes(rkm, x), wanted, strict=True):
            assert_close(given, exact)


@pytest.mark.parametrize("cell", FEEDBACK)
def test_no_batch_beyond_the_measured_one_is_joined(cell, monkeypatch):
    monkeypatch.setattr(joined_loop, "MOST_ROWS", {"float32": 8, "tf32": 1, "float16": 99, "bfloat16": 0})
    row = CELLS[cell]
    for dtype, tf32, batch, wanted in (
        (torch.float32, False, 8, True), (torch.float32, False, 9, False), (torch.float32, True, 1, True),
        (torch.float32, True, 2, False), (torch.float16, False, joined_loop.LARGEST_BATCH, True),
        (torch.float16, False, joined_loop.LARGEST_BATCH + 1, False), (torch.bfloat16, False, 1, False),
    ):  # fmt: skip
        assert joined_loop.is_joined(row, batch, 512, dtype, norm=False, tf32=tf32) is wanted
    for batch, units, wanted in ((1, 3072, True), (2, 2048, True), (2, 2049, False)):
        assert joined_loop.is_joined(row, batch, units, torch.float32, norm=False, tf32=False) is wanted


def test_an_older_triton_takes_two_launches(monkeypatch):
    asked = []
    monkeypatch.setattr(joined_loop, "is_triton_before", lambda *version: asked.append(version) or True)
    assert not joined_loop.is_joined(CELLS["rkm_lstm"], 1, 512, torch.float32, norm=False, tf32=False)
    assert asked == [joined_loop.OLDEST_TRITON]


@pytest.mark.parametrize(
    ("precision", "size", "batch", "measured"),
    [
        ("float32", 256, 1, 3.59), ("float32", 768, 1, 7.77), ("float32", 1024, 1, 9.52), ("float32", 1150, 1, 14.7),
        ("float32", 2048, 1, 43.1), ("float32", 256, 8, 7.97), ("float32", 1024, 8, 25.4), ("float32", 1536, 8, 49.9),
        ("float32", 2048, 8, 107), ("tf32", 1536, 1, 16.2), ("tf32", 2048, 1, 40.5), ("float16", 2048, 1, 15.7),
    ],
)  # fmt: skip
def test_estimates_are_near_what_an_h200_takes(precision, size, batch, measured):
    """Microseconds of a step, forward and backward."""
    with products_in(precision):
        inputs, weights = problem(size, batch, PRECISIONS[precision][0])
        assert step_time(CELLS["rkm_lstm"], inputs, weights) == pytest.approx(measured, rel=0.25)


def test_the_estimate_is_of_the_way_that_is_taken(monkeypatch):
    inputs, weights = problem(1024, 2, torch.float16)
    joined = step_time(CELLS["rkm_lstm"], inputs, weights)
    assert joined == pytest.approx(estimate._joined_time(2, 4 * 1024 * 1024, 2))
    monkeypatch.setitem(joined_loop.MOST_ROWS, "float16", 1)
    cost, operations = estimate.RATES[2], 2 * 2 * 2 * 4 * 1024 * 1024
    two = cost.fixed + cost.unit * 1024 + operations / (cost.teraflops * 1e6)
    assert step_time(CELLS["rkm_lstm"], inputs, weights) == pytest.approx(two) != joined


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 1, 1), (64, 3, 100), (85, 8, 60), (5, 1, 1150), (67, 8, 1150), (9, 3, 2049)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poisoned")
def test_odd_sizes(size, dtype, steps):
    length, batch, units = size
    compare("stepwise", device="cuda", dtype=dtype, steps=length, batch=batch, sizes=(5, units), tf32=True)
    check_all_are_joined(steps)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [256, 1024, 1150])
def test_float32_is_float32_where_tf32_is_off(batch, size):
    with products_in("float32"):
        compare("stepwise", device="cuda", dtype=torch.float32, steps=20, batch=batch, sizes=(30, size))


@pytest.mark.gpu
def test_the_same_bits_on_a_repeated_run_in_eager_use_and_as_a_graph():
    rkm = RKM(40, 300, backend="stepwise", device="cuda", memory_clip=1.0)
    x = torch.randn(sum(STRETCHES) + 2, 5, 40, device="cuda")
    wanted = outcomes(rkm, x)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(outcomes(rkm, x), wanted, strict=True))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outcomes(rkm, x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        given = outcomes(rkm, x)
    replays = []
    for _ in range(20):
        for tensor in given:
            tensor.zero_()
        graph.replay()
        replays.append([tensor.clone() for tensor in given])
    for a, b in zip(replays[0], wanted, strict=True):
        assert_close(a, b, dtype="tf32")
    for replay in replays[1:]:
        assert all(torch.equal(a, b) for a, b in zip(replay, replays[0], strict=True))


@pytest.mark.gpu
def test_layers_lengths_and_batches_share_loops_without_harm():
    check_loops_are_shared()


@pytest.mark.slow
def test_these_under_the_interpreter():
    run_interpreted("test_joined_steps.py")
