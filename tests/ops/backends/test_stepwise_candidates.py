"""``stepwise`` with candidates through every kernel against the reference: on a GPU, or in Triton's interpreter.

The interpreter takes seconds for a problem, and is given a few; a GPU is given all. The last test starts it.
"""

import itertools
from pathlib import Path

import pytest
import torch
from helpers import assert_close, forward_and_gradients, random_mask, randomized

from fairseq_rkm import RKM
from fairseq_rkm.experiments.sweep_measurement import products_in
from fairseq_rkm.ops import BACKENDS, dispatch
from fairseq_rkm.ops.backends.stepwise import step_loop
from fairseq_rkm.ops.weights import Weights
from ops.backends.feedback_kernels import DTYPES, FEEDBACK, SMALL, outcomes
from ops.backends.triton_interpreter import DEVICE, INTERPRETED, run_interpreted, runs
from ops.test_backends import check_missing_numbers_stay_where_they_are, clear_bound, compare
from ops.test_higher_derivatives import compare_derivatives
from ops.test_kernel_candidates import EXTREMES, KERNELS, bound_of, name_of

TF32 = not INTERPRETED
"""Whether products of float32 are rounded."""
FEW = ["lstm", "linear_kernel_gated"]
"""The cells that the interpreter runs through each kernel: the squashed, and the one whose scales are learned."""

on_gpus = pytest.mark.gpu
of_kernels = pytest.mark.parametrize("kernel", KERNELS, ids=name_of)


def problems():
    """Cells, kernels and dtypes: all on a GPU."""
    everything = itertools.product(FEEDBACK, KERNELS, DTYPES)
    if not INTERPRETED:
        return list(everything)
    return [
        (cell, kernel, dtype) for cell, kernel, dtype in everything
        if dtype == torch.float32 and (cell in FEW or kernel["kernel"] == "gaussian")
    ]  # fmt: skip


def for_many_units(kernel):
    """The kernel with a scale for hundreds of units, where it has one: small ones let rounding grow over the steps."""
    return {**kernel, "kernel_scale": 20.0} if "kernel_scale" in kernel else kernel


def in_words(value):
    return name_of(value) if isinstance(value, dict) else str(value)


@runs
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("cell", "kernel", "dtype"), problems(), ids=in_words)
def test_all_variants(cell, kernel, dtype):
    """All of them in float32; in other dtypes one, since each takes a second to compile."""
    options = {"device": DEVICE, "dtype": dtype, "cell": cell, "tf32": TF32, **SMALL, **kernel}
    needs_no_bound = bound_of(kernel) is None  # near one, rounding takes a value across it
    if dtype != torch.float16 or not needs_no_bound:
        compare("stepwise", mask="mixed", ngram=2, learn_sigma=True, layer_norm=True, **options)
    if needs_no_bound and dtype != torch.bfloat16 and not INTERPRETED:
        compare("stepwise", bidirectional=True, learn_sigma=True, **options)
    if dtype == torch.float32 and not INTERPRETED:
        compare("stepwise", bias=False, learn_kernel=False, layer_norm=True, **options)
        compare("stepwise", mask="mixed", reset=True, return_memory=True, ngram=3, layer_norm=True, **options)


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_in_the_interpreter_too(dtype):
    for kernel in KERNELS[:3:2]:
        compare(
            "stepwise", device=DEVICE, dtype=dtype, cell="rkm_cifg", mask="mixed", layer_norm=True, **SMALL, **kernel
        )


@runs
@pytest.mark.usefixtures("poisoned")
@of_kernels
def test_clipped_memory(kernel):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    for cell in ["rkm_cifg"] if INTERPRETED else FEEDBACK:
        bound = clear_bound(cell, dtype=torch.float32, **shape, **kernel)
        with products_in("float32"):
            compare("stepwise", device=DEVICE, dtype=torch.float32, cell=cell, memory_clip=bound, **shape, **kernel)


@runs
def test_rows_of_several_programs_and_of_several_chunks(monkeypatch):
    monkeypatch.setattr(step_loop, "LARGEST_CHUNK", 128)
    step_loop.LOOPS.clear()
    kernel = {"kernel": "gaussian", "kernel_scale": 9.0}
    compare("stepwise", device=DEVICE, dtype=torch.float32, steps=2, batch=1, sizes=(2, 520), tf32=TF32, **kernel)


@on_gpus
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 8), (64, 33, 100), (5, 20, 1150), (85, 130, 60), (9, 3, 2049)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_sizes(size, dtype):
    steps, batch, units = size
    kernel = {"kernel": "gaussian", "kernel_scale": max(1.0, units**0.5)}
    for layer_norm in {False, units > 1 and steps < 10}:  # rounding grows over many normalised steps
        compare(
            "stepwise", device="cuda", dtype=dtype, steps=steps, batch=batch, sizes=(5, units), tf32=True,
            layer_norm=layer_norm, **kernel,
        )  # fmt: skip


@on_gpus
@of_kernels
@pytest.mark.parametrize("cell", FEEDBACK)
def test_float32_is_float32_where_tf32_is_off(kernel, cell):
    with products_in("float32"):
        compare(
            "stepwise", device="cuda", dtype=torch.float32, cell=cell, steps=20, batch=8, sizes=(30, 300),
            layer_norm=True, **for_many_units(kernel),
        )  # fmt: skip


@runs
@pytest.mark.parametrize("extreme", ["zeros", "large"] if INTERPRETED else EXTREMES)
@of_kernels
def test_extreme_inputs_give_numbers(kernel, extreme):
    for cell in ["rkm_lstm"] if INTERPRETED else FEEDBACK:
        rkm = RKM(3, 4, cell=cell, ngram=2, backend="stepwise", device=DEVICE, **kernel)
        x = EXTREMES[extreme] * torch.randn(4, 2, 3, device=DEVICE)
        x[1] = 0
        x[2, 0] = EXTREMES[extreme] * rkm.weight_ih_l0[0, :3].detach()  # along a filter
        hidden, memory = torch.zeros(2, 1, 2, 4, device=DEVICE)
        context, mask = [torch.zeros(1, 2, 3, device=DEVICE)], random_mask("mixed", 2, 4).to(DEVICE)
        for name, value in forward_and_gradients(rkm, x, hidden, memory, context, mask).items():
            assert value.isfinite().all(), (cell, name)


@runs
@of_kernels
def test_missing_numbers_stay_where_they_are(kernel):
    arguments = {"cell": "rkm_cifg", "layer_norm": True}
    if not INTERPRETED or kernel["kernel"] == "gaussian":
        check_missing_numbers_stay_where_they_are("stepwise", torch.float32, DEVICE, **arguments, **kernel)


@runs
def test_gradients_of_some_parameters_are_those_of_all():
    """Sums that nobody asks for are not taken."""
    kernel = {"kernel": "polynomial", "kernel_scale": 1.3, "kernel_offset": 0.7}
    rkm = randomized(RKM(3, 5, cell="linear_kernel_gated", learn_sigma=True, backend="stepwise", **kernel)).to(DEVICE)
    x = torch.randn(3, 2, 3, device=DEVICE, requires_grad=True)
    wanted = dict(zip(["x", *dict(rkm.named_parameters())], outcomes(rkm, x)[1:], strict=True))
    for name in ("kernel_scale_log_l0", "kernel_offset_log_l0", "sigma_f_logit_l0", "weight_hh_l0", "bias_l0"):
        for other, parameter in rkm.named_parameters():
            parameter.requires_grad_(other == name)
        (given,) = torch.autograd.grad(rkm(x.detach())[0].pow(2).sum(), dict(rkm.named_parameters())[name])
        assert_close(given, wanted[name], name)


@on_gpus
def test_layers_of_different_kernels_share_no_loop():
    step_loop.LOOPS.clear()
    layers = [
        RKM(16, 100, backend="stepwise", device="cuda", memory_clip=1.0, **for_many_units(kernel)) for kernel in KERNELS
    ]
    for steps, batch in ((20, 8), (5, 5), (9, 7)):
        for layer in layers:
            x, results = torch.randn(steps, batch, 16, device="cuda"), []
            for layer.backend in ("stepwise", "batched"):
                with products_in("float32"):
                    results.append(outcomes(layer, x)[0])
            assert_close(*results, dtype="tf32")
    assert len(step_loop.LOOPS) == 2 * len(KERNELS)


@on_gpus
@of_kernels
def test_runs_repeat_and_graphs_replay_to_the_bit(kernel):
    rkm = RKM(40, 300, backend="stepwise", device="cuda", dtype=torch.bfloat16, **for_many_units(kernel))
    x = torch.randn(12, 24, 40, device="cuda", dtype=torch.bfloat16)
    wanted, again = outcomes(rkm, x), outcomes(rkm, x)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        outcomes(rkm, x)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        given = outcomes(rkm, x)
    graph.replay()
    for one, two, three in zip(wanted, again, given, strict=True):
        assert torch.equal(one, two)
        assert_close(three, one, dtype=torch.bfloat16)


@on_gpus
@of_kernels
def test_three_orders_of_derivatives_are_the_reference_s(kernel):
    compare_derivatives("stepwise", torch.float32, device="cuda", tolerance="tf32", layer_norm=True, **kernel)


@runs
@of_kernels
@pytest.mark.parametrize("cell", FEEDBACK)
def test_auto_takes_it(kernel, cell):
    row = RKM(3, 5, cell=cell, **kernel)._cell
    inputs, gates = torch.randn(3, 2, 3, device=DEVICE), len(row.gates) * 5
    recurrent = torch.randn(len(row.recurrent_gates) * 5, 5, device=DEVICE)
    weights = Weights(torch.randn(gates, 3, device=DEVICE), recurrent)
    assert dispatch.pick("auto", row, inputs, weights) is BACKENDS["stepwise"]
    wide = weights.widened(torch.float64)
    assert dispatch.pick("auto", row, inputs.double(), wide) is BACKENDS["batched"]


@pytest.mark.slow
def test_these_under_the_interpreter():
    others = ("test_triton_kernel_functions.py", "test_pointwise_candidates.py")
    run_interpreted("test_stepwise_candidates.py", *(str(Path(__file__).parents[1] / name) for name in others))
