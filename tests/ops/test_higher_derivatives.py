"""Derivatives of gradients by every backend against the reference's."""

import copy

import pytest
import torch
from helpers import assert_close, random_mask, randomized
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops import reference
from fairseq_rkm.ops.backends.native import native
from ops.test_backends import problem

compiled = pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
BACKENDS = [("batched", torch.float64), pytest.param("native", torch.float32, marks=compiled)]
VARIANTS = [
    {"cell": "lstm", "bidirectional": True, "num_layers": 2},
    {"cell": "rkm_lstm", "memory_clip": 0.4, "ngram": 2},
    {"cell": "rkm_cifg", "layer_norm": True, "ngram": 3, "ngram_padding": "same"},
    {"cell": "linear_kernel_gated", "learn_sigma": True, "feedback": False},
    {"cell": "linear_kernel", "learn_sigma": True, "layer_norm": True},
    {"cell": "ran", "bias": False},
    {"cell": "gated_cnn", "bidirectional": True},
    {"cell": "cnn", "ngram": 3},
]


def pair(backend, dtype, device="cpu", **arguments):
    """The same module with a backend and with the reference."""
    fast = randomized(RKM(3, 4, dtype=dtype, backend=backend, **arguments)).to(device)
    exact = copy.deepcopy(fast)
    exact.backend = "reference"
    return fast, exact


def derivatives(rkm, x, hidden, memory, context, mask):
    """The first three derivatives, each of random projections of the one before, by everything that has gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, hidden, memory, *(context or []))]
    output, state = rkm(leaves[0], (leaves[1], leaves[2], leaves[3:] or None), mask)
    values, wanted, all_results = [output, state.hidden, state.cell], [*leaves, *rkm.parameters()], []
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        loss = 0
        for value in values:
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            loss = loss + (value * weights.to(value)).sum()
        values = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        all_results.append(values)
    return all_results


def compare_derivatives(backend, dtype, mask="mixed", device="cpu", tolerance=None, **arguments):
    fast, exact = pair(backend, dtype, device, **arguments)
    given_problem = [t.to(device) if torch.is_tensor(t) else t for t in problem(fast, 4, 4, dtype)]
    if given_problem[3]:
        given_problem[3] = [t.to(device) for t in given_problem[3]]
    padding = random_mask(mask, 4, 4)
    padding = None if padding is None else padding.to(device)
    given, wanted = (derivatives(rkm, *given_problem, padding) for rkm in (fast, exact))
    for order, (ours, theirs) in enumerate(zip(given, wanted, strict=True), start=1):
        # All of an order at once: one that all but cancels is rounding.
        flat = [torch.cat([t.flatten().double() for t in side]).cpu() for side in (ours, theirs)]
        assert_close(*flat, f"derivative {order}", tolerance or dtype)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("arguments", VARIANTS, ids=lambda a: a["cell"])
def test_three_orders_are_the_reference_s(backend, dtype, arguments):
    for mask in ("none", "mixed"):
        compare_derivatives(backend, dtype, mask, **arguments)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
def test_gradgradcheck(cell, feedback):
    rkm = randomized(RKM(2, 2, cell=cell, feedback=feedback, learn_sigma=True, backend="batched", dtype=torch.float64))
    names = [name for name, _ in rkm.named_parameters()]
    x, hidden, memory, _ = problem(rkm, 2, 2, torch.float64)
    mask = torch.tensor([[False, False], [False, True]])

    def run(x, hidden, memory, *parameters):
        arguments = (x, (hidden, memory), mask)
        output, state = torch.func.functional_call(rkm, dict(zip(names, parameters, strict=True)), arguments)
        return output, state.cell

    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, hidden, memory, *rkm.parameters())]
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_penalty_on_gradients_trains_the_weights(backend, dtype):
    """A loss whose gradient in the output is a constant: nothing that comes in asks for a second derivative."""
    x = torch.randn(4, 3, 3, dtype=dtype)
    results = []
    for rkm in pair(backend, dtype, cell="lstm"):
        parameters = list(rkm.parameters())
        first = torch.autograd.grad(rkm(x)[0].sum(), parameters, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        loss = rkm(x)[0].sum() + sum(gradient.square().sum() for gradient in first)
        results.append(torch.autograd.grad(loss, parameters))
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_weights_made_from_one_another_have_partial_gradients(backend, dtype):
    x, base = torch.randn(4, 3, 4, dtype=dtype), torch.randn(16, 4, dtype=dtype, requires_grad=True)
    results = []
    for name in (backend, "reference"):
        rkm = RKM(4, 4, bias=False, dtype=dtype, backend=name)
        weights = {"weight_ih_l0": base * 1, "weight_hh_l0": (base * 1).tanh()}
        weights["weight_hh_l0"] = weights["weight_ih_l0"].tanh()
        output, _ = torch.func.functional_call(rkm, weights, (x,))
        (first,) = torch.autograd.grad(output.sum(), base, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), base)))
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_first_derivatives_do_without_the_reference(backend, dtype, monkeypatch):
    fast, _ = pair(backend, dtype)
    monkeypatch.setattr(reference, "recurrence", None)
    loss = fast(torch.randn(4, 3, 3, dtype=dtype))[0].sum()
    (*gradients,) = torch.autograd.grad(loss, list(fast.parameters()))
    assert not any(gradient.requires_grad for gradient in gradients)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_saved_tensors_are_asked_for_once_as_checkpoints_allow(backend, dtype):
    fast, exact = pair(backend, dtype)
    x = torch.randn(4, 3, 3, dtype=dtype, requires_grad=True)
    (given,) = torch.autograd.grad(checkpoint(lambda x: fast(x)[0].sum(), x, use_reentrant=False), x)
    (wanted,) = torch.autograd.grad(exact(x)[0].sum(), x)
    assert_close(given, wanted)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_gradients_come_in_of_any_layout(backend, dtype):
    x = torch.randn(4, 3, 3, dtype=dtype)
    steps, weights = torch.tensor([[[0, 1, 3, 2]] * 3]), torch.arange(48.0, dtype=dtype).view(4, 4, 3)
    readers = {
        "expanded": lambda output, _: output.sum(),
        "transposed": lambda output, _: (output.permute(2, 0, 1) * weights).sum(),
        "sparse": lambda output, fast: (torch.gather(output, 0, steps, sparse_grad=fast) * weights[:, 0, 0]).sum(),
        "negated view": lambda output, _: torch.complex(output, output).conj().imag.square().sum(),
    }
    for what, read in readers.items():
        results = []
        for rkm in pair(backend, dtype):
            loss = read(rkm(x)[0], rkm.backend == backend)
            results.append(torch.autograd.grad(loss, list(rkm.parameters())))
        for given, wanted in zip(*results, strict=True):
            assert_close(given, wanted, what)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_backward_pass_called_under_autocast_keeps_the_forward_pass_s_types(backend, dtype):
    if dtype == torch.float64:
        dtype = torch.float32
    fast, exact = pair(backend, dtype)
    x = torch.randn(6, 3, 3)
    wanted = torch.autograd.grad(exact(x)[0].square().sum(), list(exact.parameters()))
    loss = fast(x)[0].square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = torch.autograd.grad(loss, list(fast.parameters()))
    for ours, theirs in zip(given, wanted, strict=True):
        assert_close(ours, theirs)


def test_hessian_vector_products_and_maml_by_default():
    rkm, exact = pair("auto", torch.float32)
    x = torch.randn(4, 3, 3)
    vector = torch.randn_like(x)
    products = [
        torch.autograd.functional.hvp(lambda x, m=module: m(x)[0].square().sum(), x, vector)[1]
        for module in (rkm, exact)
    ]
    assert_close(*products)
    adapted = []
    for module in (rkm, exact):
        parameters = dict(module.named_parameters())
        inner = torch.autograd.grad(module(x)[0].sum(), list(parameters.values()), create_graph=True)
        stepped = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), inner, strict=True)}
        outer = torch.func.functional_call(module, stepped, (x,))[0].square().sum()
        adapted.append(nn.utils.parameters_to_vector(torch.autograd.grad(outer, list(parameters.values()))))
    assert_close(*adapted)
