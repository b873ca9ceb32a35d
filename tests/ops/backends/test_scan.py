"""The scan against the reference: on a GPU, or on CPU under Triton's interpreter (which the last test here starts)."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close, product_type, randomized

from fairseq_rkm import CELLS, RKM, RKMError
from ops.test_backends import check_missing_numbers_stay_where_they_are, compare, problem
from ops.test_higher_derivatives import VARIANTS, compare_derivatives

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
TF32 = product_type(torch.float32, DEVICE) == "tf32"


def runs(test):
    """Decorate a test that needs a GPU or Triton's interpreter (see below)."""
    return test if INTERPRETED else pytest.mark.gpu(test)


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
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.has_memory])
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_layer_norm(cell, mask):
    for bidirectional, size in ((False, 5), (True, 33)):
        compare(
            "scan", device=DEVICE, cell=cell, feedback=False, mask=mask, bidirectional=bidirectional, layer_norm=True,
            learn_sigma=True, sizes=(3, size), ngram=2,
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
    "arguments", [{"cell": "lstm"}, {"cell": "rkm_cifg", "layer_norm": True}, {"cell": "gated_cnn"}]
)
def test_missing_numbers_stay_where_they_are(arguments):
    check_missing_numbers_stay_where_they_are("scan", device=DEVICE, feedback=False, **arguments)


@runs
def test_three_orders_of_derivatives_are_the_reference_s():
    for arguments in VARIANTS:
        if "memory_clip" not in arguments:
            compare_derivatives("scan", torch.float64, device=DEVICE, **{**arguments, "feedback": False})


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
    with pytest.raises(RKMError, match="with clipping the memory is no linear"):
        RKM(4, 4, backend="scan", feedback=False, memory_clip=1.0, device=DEVICE)(x)
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
    if HAS_GPU or INTERPRETED:
        pytest.skip("they run in this process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-v", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
