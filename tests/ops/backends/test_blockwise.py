"""``blockwise`` against the reference in float64: on a GPU only, but for its sizes."""

import itertools

import pytest
import torch
from helpers import assert_close, training_losses

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.experiments.sweep_measurement import products_in
from fairseq_rkm.ops.backends.blockwise.blockwise import HELD, MOST_UNITS, ROWS, shared_bytes
from ops.test_backends import MISSING, check_missing_numbers_stay_where_they_are, clear_bound, compare
from ops.test_higher_derivatives import VARIANTS, compare_derivatives

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_variants(cell, dtype):
    for bidirectional, mask in itertools.product((False, True), ("none", "mixed")):
        compare(
            "blockwise", device="cuda", dtype=dtype, cell=cell, bidirectional=bidirectional, mask=mask, steps=7,
            batch=5, sizes=(6, 37), learn_sigma=True, ngram=2, tf32=True,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("cell", FEEDBACK)
def test_float32_is_float32(cell):
    with products_in("float32"):
        compare("blockwise", device="cuda", dtype=torch.float32, cell=cell, steps=70, batch=40, sizes=(30, 100))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
def test_sequences_that_begin_anew_and_all_memories(cell):
    compare(
        "blockwise", device="cuda", dtype=torch.float32, cell=cell, mask="mixed", ngram=2, tf32=True, reset=True,
        return_memory=True, steps=7, batch=5, sizes=(6, 37),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipped_memory(cell, dtype):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    bound = clear_bound(cell, dtype=dtype, **shape)
    with products_in("float32"):
        compare("blockwise", device="cuda", dtype=dtype, cell=cell, memory_clip=bound, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", MISSING, ids=str)
def test_missing_numbers_stay_where_they_are(arguments):
    if arguments.get("feedback") is False or arguments["cell"] not in FEEDBACK or arguments.get("layer_norm"):
        pytest.skip("it is for cells with feedback, without layer normalisation")
    check_missing_numbers_stay_where_they_are("blockwise", torch.float32, "cuda", **arguments)


@pytest.mark.gpu
def test_three_orders_of_derivatives_are_the_reference_s():
    for arguments in VARIANTS:
        plain = arguments.get("feedback") is not False and not arguments.get("layer_norm")
        if arguments["cell"] in FEEDBACK and plain:
            compare_derivatives("blockwise", torch.float32, device="cuda", tolerance="tf32", **arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("steps", "batch", "size"),
    [(2, 3, 5), (1, 1, 8), (63, 33, 100), (5, 140, 128), (6, 300, 65), (4, 600, 127), (4, 1100, 64), (9, 3, 51)],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["rkm_lstm", "rkm_cifg", "linear_kernel_gated", "linear_kernel"])
def test_odd_sizes(steps, batch, size, dtype, cell):
    compare("blockwise", device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, size), cell=cell, tf32=True)


@pytest.mark.gpu
def test_a_sequence_that_cudnn_refuses():
    x = torch.randn(70_000, 2, 8, device="cuda")
    given, wanted = (RKM(8, 16, backend=name, device="cuda") for name in ("blockwise", "stepwise"))
    wanted.load_state_dict(given.state_dict())
    with products_in("float32"):
        results = [rkm(x)[0] for rkm in (given, wanted)]
        assert_close(*results)
        for result in results:
            result.square().mean().backward()
        assert_close(given.weight_hh_l0.grad, wanted.weight_hh_l0.grad, dtype="tf32")


@pytest.mark.gpu
def test_the_same_bits_on_a_repeated_run():
    rkm = RKM(40, 100, backend="blockwise", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(50, 24, 40, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = []
    for _ in range(3):
        output, _ = rkm(x)
        runs.append([output, *torch.autograd.grad(output.float().pow(2).sum(), [x, *rkm.parameters()])])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_directions_that_run_at_the_same_time_do_not_disturb_each_other():
    """Much memory is taken and freed meanwhile, by both streams."""
    both = RKM(16, 64, num_layers=2, bidirectional=True, backend="blockwise", device="cuda")
    wanted = {}
    for turn in range(60):
        torch.manual_seed(turn % 6)
        x = torch.randn(30 + turn % 3, 16, 16, device="cuda", requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            if turn < 6:
                patch.setattr(RKM, "_leaves_room", lambda *_: False)
            output, state = both(x)
            loss = output.square().sum() + state.hidden.sum() + (state.cell * state.cell).sum()
            given = [output, *state[:2], *torch.autograd.grad(loss, [x, *both.parameters()])]
        del output, state, loss
        for tensor, expected in zip(given, wanted.setdefault(turn % 6, given), strict=True):
            assert torch.equal(tensor, expected)


@pytest.mark.gpu
def test_training_follows_the_reference():
    given, wanted = (
        training_losses(200, backend, device="cuda", layer_norm=False) for backend in ("blockwise", "reference")
    )
    assert_close(given, wanted, dtype="tf32")


@pytest.mark.gpu
def test_auto_takes_it_for_small_layers_and_for_strict_float32():
    from fairseq_rkm.ops import BACKENDS, Weights, dispatch

    def picked(size, batch, dtype):
        weights = Weights(*(torch.zeros(4 * size, size, device="cuda", dtype=dtype) for _ in range(2)))
        x = torch.zeros(1, batch, size, device="cuda", dtype=dtype)
        backend = dispatch.pick("auto", CELLS["rkm_lstm"], x, weights)
        return next(name for name, row in BACKENDS.items() if row is backend)

    for size, batch, dtype in itertools.product((16, 64), (1, 32, 512), DTYPES):
        assert picked(size, batch, dtype) == "blockwise"
    with products_in("float32"):
        assert picked(128, 16, torch.float32) == "blockwise"
        assert picked(256, 16, torch.float32) == "stepwise"
    assert picked(512, 16, torch.bfloat16) == "persistent"
    assert picked(1024, 512, torch.bfloat16) == "stepwise"


@pytest.mark.gpu
def test_what_it_cannot_take_is_refused_with_a_reason():
    x = torch.zeros(2, 1, 4, device="cuda")
    with pytest.raises(RKMError, match="layers of up to 128 units"):
        RKM(4, 129, backend="blockwise", device="cuda")(x)
    with pytest.raises(RKMError, match=r"not in torch\.float64"):
        RKM(4, 4, backend="blockwise", device="cuda", dtype=torch.float64)(x.double())
    with pytest.raises(RKMError, match="without feedback"):
        RKM(4, 4, backend="blockwise", feedback=False, device="cuda")(x)
    with pytest.raises(RKMError, match="does not normalise"):
        RKM(4, 4, backend="blockwise", layer_norm=True, device="cuda")(x)
    with pytest.raises(RKMError, match="at least one step"):
        RKM(4, 4, backend="blockwise", device="cuda")(x[:0])


def test_on_cpu_it_is_refused_by_name():
    with pytest.raises(RKMError, match="backend 'blockwise' cannot run this: it runs on CUDA GPUs"):
        RKM(4, 4, backend="blockwise")(torch.zeros(2, 1, 4))


@pytest.mark.parametrize("cell", FEEDBACK)
def test_a_block_fits_a_multiprocessor_of_an_h100(cell):
    for size, direction in itertools.product((1, 4, 63, 64, 65, 100, MOST_UNITS), ("forward", "backward")):
        for rows in HELD:
            assert shared_bytes(direction, CELLS[cell], size, rows) <= 232_448
        if size <= 64:
            assert all(shared_bytes(direction, CELLS[cell], size, rows) < 48 << 10 for rows in ROWS)
