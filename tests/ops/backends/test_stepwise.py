"""``stepwise`` against the reference: on a GPU, or on CPU in Triton's interpreter (which the last test here starts)."""

import importlib.util
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import assert_close, training_losses

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.experiments.sweep_measurement import products_in
from fairseq_rkm.ops.backends.stepwise import step_loop
from fairseq_rkm.ops.backends.stepwise.step_loop import STRETCHES
from ops.test_backends import MISSING, check_missing_numbers_stay_where_they_are, clear_bound, compare
from ops.test_higher_derivatives import VARIANTS, compare_derivatives

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = {"steps": 3, "batch": 3, "sizes": (2, 5)} if INTERPRETED else {"steps": 7, "batch": 5, "sizes": (6, 37)}


def runs(test):
    """Decorate a test that needs a GPU or Triton's interpreter (see below)."""
    return test if INTERPRETED else pytest.mark.gpu(test)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES)
def test_all_variants(cell, dtype):
    for layer_norm, mask in itertools.product((False, True), ("none", "mixed")):
        compare(
            "stepwise", device=DEVICE, dtype=dtype, cell=cell, layer_norm=layer_norm, bidirectional=mask == "mixed",
            mask=mask, learn_sigma=True, ngram=2, tf32=not INTERPRETED, **SMALL,
        )  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    compare("stepwise", device=DEVICE, dtype=dtype, mask="mixed", tf32=not INTERPRETED, **SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", FEEDBACK)
def test_float32_is_float32_where_tf32_is_off(cell):
    with products_in("float32"):
        compare("stepwise", device="cuda", dtype=torch.float32, cell=cell, steps=70, batch=40, sizes=(30, 300))


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
def test_sequences_that_begin_anew_and_all_memories(cell):
    compare(
        "stepwise", device=DEVICE, dtype=torch.float32, cell=cell, mask="mixed", ngram=2, tf32=not INTERPRETED,
        reset=True, return_memory=True, **SMALL,
    )  # fmt: skip


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", FEEDBACK)
def test_clipped_memory(cell):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    for dtype in [torch.float32] if INTERPRETED else DTYPES:
        bound = clear_bound(cell, dtype=dtype, **shape)
        compare("stepwise", device=DEVICE, dtype=dtype, cell=cell, tf32=not INTERPRETED, memory_clip=bound, **shape)


@runs
@pytest.mark.parametrize("arguments", MISSING[:1] if INTERPRETED else MISSING, ids=str)
def test_missing_numbers_stay_where_they_are(arguments):
    if arguments.get("feedback") is False or arguments["cell"] not in FEEDBACK:
        pytest.skip("it is for cells with feedback")
    check_missing_numbers_stay_where_they_are("stepwise", torch.float32, DEVICE, **arguments)


@pytest.mark.gpu
def test_three_orders_of_derivatives_are_the_reference_s():
    for arguments in VARIANTS:
        if arguments["cell"] in FEEDBACK and arguments.get("feedback") is not False:
            compare_derivatives("stepwise", torch.float32, device="cuda", tolerance="tf32", **arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("steps", "batch", "size"), [(1, 1, 1), (3, 1, 8), (64, 33, 100), (5, 20, 1150), (85, 130, 60), (9, 3, 2049)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_odd_sizes(steps, batch, size, dtype, layer_norm):
    if layer_norm and size == 1:
        pytest.skip("a single unit is normalised to nothing: all gradients are zero, and only rounding is left of them")
    compare(
        "stepwise", device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, size), layer_norm=layer_norm,
        tf32=True,
    )  # fmt: skip


def outcomes(rkm, x):
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    output, _ = rkm(x)
    return [output.detach(), *torch.autograd.grad(output.float().pow(2).sum(), [x, *rkm.parameters()])]


@pytest.mark.gpu
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_same_bits_on_a_repeated_run(layer_norm):
    rkm = RKM(40, 300, layer_norm=layer_norm, backend="stepwise", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(50, 24, 40, device="cuda", dtype=torch.bfloat16)
    first, *others = (outcomes(rkm, x) for _ in range(3))
    for run in others:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@pytest.mark.gpu
def test_layers_lengths_and_batches_share_loops_without_harm():
    """Batches of one loop's rows in turn, of any length: whatever another left in the buffers does no harm."""
    step_loop.LOOPS.clear()
    layers = [RKM(16, 100, backend="stepwise", device="cuda", memory_clip=1.0) for _ in range(2)]
    exact = [RKM(16, 100, backend="batched", device="cuda", memory_clip=1.0) for _ in range(2)]
    for layer, twin in zip(layers, exact, strict=True):
        twin.load_state_dict(layer.state_dict())
    for steps, batch in ((70, 8), (4, 3), (5, 5), (81, 1), (4, 8), (9, 7)):
        for layer, twin in zip(layers, exact, strict=True):
            x = torch.randn(steps, batch, 16, device="cuda")
            for given, wanted in zip(outcomes(layer, x), outcomes(twin, x), strict=True):
                assert_close(given, wanted, dtype="tf32")
    assert len(step_loop.LOOPS) == 4  # forward and backward, and both for one row


@pytest.mark.gpu
def test_few_loops_are_kept(monkeypatch):
    step_loop.LOOPS.clear()
    monkeypatch.setattr(step_loop, "MOST_LOOPS", 3)
    rkm = RKM(8, 16, backend="stepwise", device="cuda", memory_clip=1.0)
    for batch in (1, 9, 17, 25, 33, 1):
        rkm(torch.randn(6, batch, 8, device="cuda"))[0].sum().backward()
    assert len(step_loop.LOOPS) == 3
    monkeypatch.setattr(step_loop, "MOST_BUFFERED", 1)
    rkm(torch.randn(6, 41, 8, device="cuda"))
    assert len(step_loop.LOOPS) == 1


@pytest.mark.gpu
def test_it_can_be_recorded_into_a_graph():
    rkm = RKM(16, 40, backend="stepwise", device="cuda", memory_clip=1.0)
    x = torch.randn(max(STRETCHES) + 6, 5, 16, device="cuda")
    wanted = outcomes(rkm, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        outcomes(rkm, x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        given = outcomes(rkm, x)
    for tensor in given:
        tensor.zero_()
    graph.replay()
    for a, b in zip(given, wanted, strict=True):
        assert_close(a, b, dtype="tf32")


@pytest.mark.gpu
def test_threads_and_streams_do_not_disturb_each_other():
    rkm = RKM(16, 64, backend="stepwise", device="cuda", memory_clip=1.0)
    inputs = [torch.randn(40, 8, 16, device="cuda") for _ in range(6)]
    wanted = [outcomes(rkm, x) for x in inputs]
    torch.cuda.synchronize()
    found = {}

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream() if number % 2 else torch.cuda.default_stream()):
            for _ in range(10):
                found[number] = outcomes(rkm, inputs[number])
        torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, results in enumerate(wanted):
        assert all(torch.equal(a, b) for a, b in zip(found[number], results, strict=True))


@pytest.mark.gpu
def test_training_follows_the_reference():
    given, wanted = (training_losses(200, backend, device="cuda") for backend in ("stepwise", "reference"))
    assert_close(given, wanted, dtype="tf32")


@pytest.mark.gpu
def test_products_take_tf32_as_cudnn_does_and_leave_pytorch_s_setting(monkeypatch):
    rkm = RKM(64, 512, backend="stepwise", device="cuda", memory_clip=1.0)
    x, exact = torch.randn(20, 16, 64, device="cuda"), RKM(64, 512, backend="reference", memory_clip=1.0).double()
    exact.load_state_dict(rkm.state_dict())
    wanted = exact(x.cpu().double())[0]
    errors = {}
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors[allowed] = ((rkm(x)[0].cpu().double() - wanted).norm() / wanted.norm()).item()
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert errors[False] < 1e-6
    assert errors[True] > 1e-5


@pytest.mark.gpu
def test_what_it_cannot_take_is_refused_with_a_reason():
    x = torch.zeros(2, 1, 4, device="cuda")
    with pytest.raises(RKMError, match=r"not in torch\.float64"):
        RKM(4, 4, backend="stepwise", device="cuda", dtype=torch.float64)(x.double())
    with pytest.raises(RKMError, match="without feedback"):
        RKM(4, 4, backend="stepwise", feedback=False, device="cuda")(x)
    with pytest.raises(RKMError, match="at least one step"):
        RKM(4, 4, backend="stepwise", device="cuda")(x[:0])


def test_on_cpu_it_is_refused_by_name_and_passed_over_by_auto():
    if INTERPRETED:
        return
    with pytest.raises(RKMError, match="backend 'stepwise' cannot run this: it runs on CUDA GPUs"):
        RKM(4, 4, backend="stepwise")(torch.zeros(2, 1, 4))
    assert RKM(4, 4)(torch.zeros(2, 1, 4))[0].shape == (2, 1, 4)


@pytest.mark.slow
def test_all_of_the_above_under_the_interpreter():
    if DEVICE == "cuda" or INTERPRETED:
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
