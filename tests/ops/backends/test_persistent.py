"""The persistent kernels against the reference in float64: on a GPU only."""

import itertools

import pytest
import torch
from helpers import assert_close, training_losses

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops.backends.persistent import launch, persistent, plan
from ops.test_backends import MISSING, check_missing_numbers_stay_where_they_are, clear_bound, compare
from ops.test_higher_derivatives import VARIANTS, compare_derivatives

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_variants(cell, dtype):
    for layer_norm, bidirectional, mask in itertools.product((False, True), (False, True), ("none", "mixed")):
        compare(
            "persistent", device="cuda", dtype=dtype, cell=cell, layer_norm=layer_norm, bidirectional=bidirectional,
            mask=mask, steps=7, batch=5, sizes=(6, 37), learn_sigma=True, ngram=2, tf32=True,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_that_begin_anew_and_all_memories(cell, dtype):
    for bidirectional, mask in itertools.product((False, True), ("none", "mixed")):
        compare(
            "persistent", device="cuda", dtype=dtype, cell=cell, bidirectional=bidirectional, mask=mask, steps=7,
            batch=5, sizes=(6, 37), ngram=2, tf32=True, reset=True, return_memory=True,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_memory(cell, dtype):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    bound = clear_bound(cell, dtype=dtype, **shape)
    compare("persistent", device="cuda", dtype=dtype, cell=cell, tf32=True, memory_clip=bound, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", MISSING, ids=str)
def test_missing_numbers_stay_where_they_are(arguments):
    if arguments.get("feedback") is False or arguments["cell"] not in FEEDBACK:
        pytest.skip("it is for cells with feedback")
    check_missing_numbers_stay_where_they_are("persistent", torch.float32, "cuda", **arguments)


@pytest.mark.gpu
def test_three_orders_of_derivatives_are_the_reference_s():
    for arguments in VARIANTS:
        if arguments["cell"] in FEEDBACK and arguments.get("feedback") is not False:
            compare_derivatives("persistent", torch.float32, device="cuda", tolerance="tf32", **arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("steps", "batch", "size"), [(1, 1, 1), (3, 1, 8), (63, 33, 100), (5, 20, 1150), (4, 200, 500), (9, 3, 651)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_odd_sizes(steps, batch, size, dtype, layer_norm):
    if layer_norm and size == 1:
        pytest.skip("a single unit is normalised to nothing: all gradients are zero, and only rounding is left of them")
    compare(
        "persistent", device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, size), layer_norm=layer_norm,
        tf32=True,
    )  # fmt: skip


@pytest.fixture
def spread(monkeypatch):
    """Have plans of so many groups, each of up to so many rows, whatever the batch, with clusters of a given size."""

    def force(groups, rows, cluster, single):
        def plan_for(problem):
            return plan.make_plan.__wrapped__(
                len(problem.cell.recurrent_gates), problem.size, 8 * groups, problem.dtype.itemsize, problem.norm,
                room=((cluster, 80),), shared=99_000,
            )  # fmt: skip

        for module in (plan, launch, persistent):
            monkeypatch.setattr(module, "plan_for", plan_for)
        if single:  # as many passes as there are tiles
            arrange = plan._arrange
            monkeypatch.setattr(plan, "_arrange", lambda *a: (k := arrange(*a)) and k._replace(pass_tiles=1))
        monkeypatch.setattr(plan, "_row_choices", lambda _, tried: [rows] if tried == groups else [])
        launch.prepare.cache_clear()

    yield force
    launch.prepare.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("groups", "rows", "cluster", "single"),
    [(3, 8, 1, False), (7, 20, 1, True), (1, 24, 2, True), (4, 20, 4, False), (2, 8, 8, False), (2, 40, 4, True)],
)
@pytest.mark.parametrize(("cell", "mask"), [("rkm_lstm", "none"), ("linear_kernel_gated", "mixed")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_plan_takes_any_batch(spread, groups, rows, cluster, single, cell, mask, dtype, layer_norm):
    """Among them such that leave groups or passes without rows, and such that take up to four launches."""
    if cluster > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters of blocks need compute capability 9.0")
    spread(groups, rows, cluster, single)
    for batch in (*range(1, 10), 15, 17, 33, 49, 65, 81):
        compare(
            "persistent", device="cuda", dtype=dtype, cell=cell, layer_norm=layer_norm, mask=mask, steps=6, batch=batch,
            sizes=(4, 21), learn_sigma=True, tf32=True,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_same_bits_on_a_repeated_run(layer_norm):
    rkm = RKM(40, 300, layer_norm=layer_norm, backend="persistent", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(50, 24, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = []
    for _ in range(3):
        output, _ = rkm(x)
        runs.append([output, *torch.autograd.grad(output.float().pow(2).sum(), [x, *rkm.parameters()])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_training_follows_the_reference():
    given, wanted = (training_losses(200, backend, device="cuda") for backend in ("persistent", "reference"))
    assert_close(given, wanted, dtype="tf32")


@pytest.mark.gpu
def test_what_it_cannot_take_is_refused_with_a_reason():
    x = torch.zeros(2, 1, 4, device="cuda")
    with pytest.raises(RKMError, match="weights of 9000 units do not fit"):
        RKM(4, 9000, backend="persistent", device="cuda")(x)
    with pytest.raises(RKMError, match=r"not in torch\.float64"):
        RKM(4, 4, backend="persistent", device="cuda", dtype=torch.float64)(x.double())
    with pytest.raises(RKMError, match="without feedback"):
        RKM(4, 4, backend="persistent", feedback=False, device="cuda")(x)
    with pytest.raises(RKMError, match="at least one step"):
        RKM(4, 4, backend="persistent", device="cuda")(x[:0])
    assert RKM(4, 4, device="cuda")(x[:0])[0].shape == (0, 1, 4)


def test_on_cpu_it_is_refused_by_name_and_passed_over_by_auto():
    with pytest.raises(RKMError, match="backend 'persistent' cannot run this: it runs on CUDA GPUs"):
        RKM(4, 4, backend="persistent")(torch.zeros(2, 1, 4))
    assert RKM(4, 4)(torch.zeros(2, 1, 4))[0].shape == (2, 1, 4)
