"""The scan against the reference: on a GPU, or on CPU under Triton's interpreter (which the last test here starts)."""

import itertools

import numpy as np
import pytest
import torch
from helpers import assert_close, product_type, randomized
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import Weights, recurrence
from ops.backends.triton_interpreter import DEVICE, HAS_GPU, INTERPRETED, run_interpreted, runs
from ops.test_backends import (
    check_missing_numbers_stay_where_they_are,
    clear_bound,
    compare,
    gradients_at_the_bound,
    problem,
)
from ops.test_higher_derivatives import VARIANTS, compare_derivatives
from ops.test_kernel_candidates import bound_of, of_kernels
from ops.test_operators import check_operator

TF32 = product_type(torch.float32, DEVICE) == "tf32"


@pytest.fixture(autouse=True)
def _parallel_scan(monkeypatch):
    """Triton's interpreter scans one element after the other; this scans in parallel, as a GPU does, and faster."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import ScanOps

    def by_doubling(scan, tensors):
        steps, axis = tensors[0].handle.data.shape[scan.axis], scan.axis
        values = [t.handle.data.copy() for t in tensors]
        for distance in (1 << i for i in range((steps - 1).bit_length())):
            before = [scan.to_tensor(np.roll(v, distance, axis), t.dtype) for v, t in zip(values, tensors, strict=True)]
            now = [scan.to_tensor(v, t.dtype) for v, t in zip(values, tensors, strict=True)]
            joined = scan.combine_fn.fn(*before, *now)
            for old, new in zip(values, joined, strict=True):
                old[distance:] = new.handle.data[distance:]
        return [scan.to_tensor(v, t.dtype) for v, t in zip(values, tensors, strict=True)]

    monkeypatch.setattr(ScanOps, "generic_scan", by_doubling)


@runs
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_all_variants(cell, mask):
    for ngram, bidirectional in ((1, False), (3, True)):
        compare(
            "scan", device=DEVICE, cell=cell, feedback=False, mask=mask, ngram=ngram, bidirectional=bidirectional,
            learn_sigma=True, sizes=(3, 5),
        )  # fmt: skip


@runs
@pytest.mark.parametrize(("steps", "batch", "size"), [(1, 1, 1), (33, 2, 33), (67, 1, 3)])
def test_odd_sizes_across_chunks(steps, batch, size):
    for cell in ("rkm_lstm", "linear_kernel", "gated_cnn"):
        compare("scan", device=DEVICE, cell=cell, feedback=False, steps=steps, batch=batch, sizes=(2, size))


@runs
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_clipped_memory(cell, mask):
    """Most initial states are beyond the bound, and some of the memory is clipped and some is not."""
    for steps, clip, bidirectional in ((5, 0.4, True), (67, 0.1, False)):
        compare(
            "scan", device=DEVICE, cell=cell, feedback=False, mask=mask, memory_clip=clip, steps=steps,
            bidirectional=bidirectional, ngram=2, learn_sigma=True, sizes=(3, 5),
        )  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_clipped_memory_in_other_dtypes(dtype):
    shape = {"steps": 7, "batch": 3, "sizes": (6, 9), "feedback": False}
    for cell in ("rkm_lstm", "rkm_cifg", "linear_kernel", "gated_cnn"):
        bound = clear_bound(cell, dtype=dtype, **shape)
        for mask in ("none", "mixed"):
            compare("scan", device=DEVICE, dtype=dtype, cell=cell, mask=mask, tf32=TF32, memory_clip=bound, **shape)


@runs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_passes_at_the_bound_itself_and_not_beyond(dtype):
    for cell in (name for name, row in CELLS.items() if not row.squash_candidate):
        given = gradients_at_the_bound("scan", cell, False, dtype, DEVICE)
        assert given[0].ne(0).tolist() == [True, True, False]
        assert_close(given, gradients_at_the_bound("reference", cell, False, dtype), cell)


@runs
@of_kernels
def test_candidates_through_a_kernel(kernel):
    for cell in CELLS:
        options = {"device": DEVICE, "cell": cell, "feedback": False, "sizes": (3, 5), "learn_sigma": True, **kernel}
        compare("scan", mask="mixed", ngram=3, memory_clip=bound_of(kernel), bidirectional=True, **options)
    compare("scan", device=DEVICE, cell="rkm_cifg", feedback=False, layer_norm=True, return_memory=True, **kernel)
    shape = {"steps": 7, "batch": 3, "sizes": (6, 9), "feedback": False}
    for dtype in (torch.float32, torch.bfloat16):
        for cell in ("lstm", "linear_kernel"):
            compare("scan", device=DEVICE, dtype=dtype, cell=cell, tf32=TF32, **shape, **kernel)


def one_unit(backend, steps, memory, dtype=torch.float64):
    """Output, final memory and all gradients of one unit with a bound of 1, from pre-activations and ``c_0``.

    Args:
        backend: the backend.
        steps: a 16th of the candidate, and the forget and output pre-activations of each step; None for padding.
        memory: ``c_0``.
        dtype: of the inputs.
    """
    rkm = RKM(3, 1, cell="rkm_cifg", feedback=False, memory_clip=1.0, bias=False, backend=backend, dtype=dtype)
    with torch.no_grad():
        rkm.weight_ih_l0.copy_(torch.eye(3))
        rkm.weight_ih_l0[0, 0] = 16  # an input of 1e308 overflows, and leaves the gates beside it alone
    rkm.to(device := DEVICE if backend == "scan" else "cpu")
    x = torch.tensor([[step or (0.0,) * 3] for step in steps], dtype=dtype, device=device).requires_grad_()
    mask = torch.tensor([[step is None for step in steps]], device=device)
    first = torch.full((1, 1, 1), memory, dtype=torch.promote_types(dtype, torch.float32), device=device)
    first.requires_grad_()
    output, state = rkm(x, (first.to(dtype) * 0, first), mask if mask.any() else None)
    gradients = torch.autograd.grad([output.sum() + state.cell.sum()], [x, first])
    return [t.detach().cpu() for t in (output, state.cell, *gradients)]


NUMBERS = st.sampled_from([0.0, 0.02, -0.02, 0.06, -0.1, 0.5, -1e3, 1e35, -1e35, 1e308, -1e308])
STEPS = st.lists(st.none() | st.tuples(NUMBERS, st.sampled_from([-800.0, -1.0, 0.5, 800.0]), st.just(0.7)), min_size=1)


@runs
@settings(deadline=None, max_examples=40)
@given(steps=STEPS, memory=st.sampled_from([0.0, 0.5, -1.0, 3.0, -1e3, 1e20]), missing=st.none() | st.integers(0, 9))
@example(steps=[None, (1e308, -800.0, 0.7), (0.02, -800.0, 0.7)], memory=3.0, missing=None)
@example(steps=[(0.02, 0.5, 0.7)] * 31 + [None] * 4 + [(-0.02, 800.0, 0.7)] * 3, memory=1e20, missing=None)
def test_clipping_takes_any_number_as_the_reference_does(steps, memory, missing):
    """Overflown candidates are clipped, gates at 0 and 1 do no harm, and NaN stays NaN."""
    if missing is not None and missing < len(steps):
        steps[missing] = (torch.nan, 0.5, 0.7)
    results = zip(*(one_unit(backend, steps, memory) for backend in ("scan", "reference")), strict=True)
    # Backward in time NaN reaches all: a backward pass written by hand multiplies it by 0 where autograd cuts it off.
    for result, wanted in itertools.islice(results, 4 if missing is None else 2):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_that_was_clipped_and_is_kept_whole_stands_at_the_bound(dtype):
    """A forget gate that is 1 in the arithmetic carries the bound itself, through which the gradient passes."""
    _, _, to_steps, to_first = one_unit("scan", [(0.0, 40.0, 0.0)] * 35, 1.0, dtype)
    assert to_first.item() == one_unit("reference", [(0.0, 40.0, 0.0)] * 35, 1.0, dtype)[3].item() > 1
    assert to_steps[:, 0, 2].ne(0).all()


@runs
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.has_memory])
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_layer_norm(cell, mask):
    for bidirectional, size in ((False, 5), (True, 33)):
        compare(
            "scan", device=DEVICE, cell=cell, feedback=False, mask=mask, bidirectional=bidirectional, layer_norm=True,
            learn_sigma=True, sizes=(3, size), ngram=2,
        )  # fmt: skip


@runs
@pytest.mark.parametrize(("cell", "mask"), [("rkm_cifg", "none"), ("lstm", "mixed")])
def test_sequences_that_begin_anew_and_all_memories(cell, mask):
    compare(
        "scan", device=DEVICE, cell=cell, feedback=False, mask=mask, ngram=3, reset=True, return_memory=True,
        steps=4, batch=3,
    )  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_norm_in_other_dtypes(dtype):
    for cell, mask in itertools.product(("rkm_lstm", "rkm_cifg", "lstm"), ("none", "mixed")):
        compare(
            "scan", device=DEVICE, dtype=dtype, cell=cell, feedback=False, mask=mask, steps=7, sizes=(6, 9),
            layer_norm=True, tf32=TF32,
        )  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    for cell, mask in itertools.product(("rkm_lstm", "rkm_cifg", "lstm", "ran", "cnn"), ("none", "mixed")):
        compare(
            "scan", device=DEVICE, dtype=dtype, cell=cell, feedback=False, mask=mask, steps=7, sizes=(6, 9), tf32=TF32
        )


@runs
@pytest.mark.parametrize("bias", [-200.0, 200.0])
def test_forget_gates_at_zero_and_one_do_no_harm(bias):
    """Over many steps products of gates vanish, or are one: nothing overflows and the memory is right."""
    rkm = randomized(RKM(2, 3, feedback=False, forget_bias=bias, backend="scan", dtype=torch.float64))
    reference = RKM(2, 3, feedback=False, backend="reference", dtype=torch.float64)
    reference.load_state_dict(rkm.state_dict())
    x, hidden, memory, _ = problem(rkm, 100, 1, torch.float64)
    given, _ = rkm.to(DEVICE)(x.to(DEVICE), (hidden.to(DEVICE), memory.to(DEVICE)))
    assert_close(given.cpu(), reference(x, (hidden, memory))[0])


@runs
@pytest.mark.parametrize(
    "arguments",
    [
        {"cell": "lstm"},
        {"cell": "rkm_cifg", "layer_norm": True},
        {"cell": "gated_cnn"},
        {"cell": "rkm_lstm", "memory_clip": 0.4},
        {"cell": "linear_kernel_gated", "memory_clip": 0.4, "bidirectional": True},
        {"cell": "cnn", "memory_clip": 0.4},
    ],
    ids=str,
)
def test_missing_numbers_stay_where_they_are(arguments):
    check_missing_numbers_stay_where_they_are("scan", device=DEVICE, feedback=False, **arguments)


@runs
def test_three_orders_of_derivatives_are_the_reference_s():
    for arguments in VARIANTS:
        compare_derivatives("scan", torch.float64, device=DEVICE, **{**arguments, "feedback": False})


@runs
def test_its_operator_is_declared_as_pytorch_demands():
    check_operator("scan", device=DEVICE, feedback=False, cell="rkm_cifg", ngram=2, mask="mixed")
    check_operator("scan", device=DEVICE, feedback=False, cell="linear_kernel", layer_norm=True, state=False)


@runs
def test_a_state_of_any_stride_is_read_right():
    fast = randomized(RKM(3, 4, feedback=False, layer_norm=True, backend="scan", dtype=torch.float64)).to(DEVICE)
    x, state = (torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in ((5, 2, 3), (1, 2, 4, 2)))
    strided = state.unbind(-1)
    assert not strided[1].is_contiguous()
    for parameter in fast.parameters():
        parameter.data = torch.stack([parameter.data, torch.full_like(parameter, torch.nan)], dim=-1)[..., 0]
    given, _ = fast(x, strided)
    wanted, _ = fast(x, tuple(t.contiguous() for t in strided))
    assert_close(given, wanted)


@runs
def test_what_it_cannot_take_is_refused_with_a_reason():
    x = torch.zeros(2, 1, 4, device=DEVICE)
    with pytest.raises(RKMError, match="with feedback a step has to wait"):
        RKM(4, 4, backend="scan", device=DEVICE)(x)
    with pytest.raises(RKMError, match="without memory it does not normalise"):
        RKM(4, 4, cell="gated_cnn", backend="scan", layer_norm=True, device=DEVICE)(x)
    with pytest.raises(RKMError, match=r"it clips at 1e\+30 or below, not at 1e\+31"):
        RKM(4, 4, backend="scan", feedback=False, memory_clip=1e31, device=DEVICE)(x)
    normed = Weights(torch.zeros(16, 4), norm_weight=torch.ones(4), norm_bias=torch.zeros(4))
    normed = Weights(*(w.to(DEVICE) if isinstance(w, torch.Tensor) else w for w in normed))
    with pytest.raises(RKMError, match="it clips no memory that is normalised"):
        recurrence(CELLS["rkm_lstm"].without_feedback().clipped(1), x, normed, 4, None, None, backend="scan")
    with pytest.raises(RKMError, match="up to 8192 units"):
        RKM(4, 8193, cell="rkm_cifg", backend="scan", feedback=False, layer_norm=True, device=DEVICE)(x)
    assert RKM(4, 4, feedback=False, device=DEVICE)(x[:0])[0].shape == (0, 1, 4)


def test_on_cpu_it_is_refused_by_name():
    if HAS_GPU or INTERPRETED:
        pytest.skip("it runs here")
    with pytest.raises(RKMError, match="backend 'scan' cannot run this: it runs on CUDA GPUs"):
        RKM(4, 4, feedback=False, backend="scan")(torch.zeros(2, 1, 4))


@pytest.mark.slow
def test_all_of_the_above_under_the_interpreter():
    run_interpreted("test_scan.py")
