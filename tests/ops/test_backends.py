"""Every backend against the reference: outputs, final states and the gradients of all inputs."""

import itertools

import pytest
import torch
from helpers import (
    assert_close,
    forward_and_gradients,
    join_scales,
    random_mask,
    random_reset,
    randomized,
    training_losses,
)

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops import BACKENDS, reference

FAST = [name for name in BACKENDS if name not in {"reference", "native", "persistent", "blockwise", "stepwise", "scan"}]
NGRAMS = [(1, "causal"), (3, "causal"), (3, "same"), (5, "causal"), (5, "same")]


def problem(rkm, steps, batch, dtype):
    """Inputs and a full initial state for a stack."""
    rows = rkm.num_layers * (1 + rkm.bidirectional)
    x = torch.randn(steps, batch, rkm.input_size, dtype=dtype)
    hidden = torch.randn(rows, batch, rkm.hidden_size, dtype=dtype)
    memory = torch.randn(rows, batch, rkm.hidden_size, dtype=torch.promote_types(dtype, torch.float32))
    context = None
    if rkm.ngram > 1:
        sizes = [rkm.layer_input_size(layer) for layer in range(rkm.num_layers)]
        context = [torch.randn(rkm.ngram - 1, batch, size, dtype=dtype) for size in sizes]
    return x, hidden, memory, context


def compare(
    backend, steps=5, batch=4, sizes=(3, 5), mask="none", dtype=torch.float64, device="cpu", tf32=False, seed=0,
    reset=False, return_memory=False, **arguments,
):  # fmt: skip
    """A backend in a dtype against the reference in float64 with the same (rounded) weights and inputs.

    Unbounded unless asked otherwise: rounding takes some values across a bound, which changes their gradients.
    """
    arguments.setdefault("memory_clip", None)
    torch.manual_seed(seed)
    fast = randomized(RKM(*sizes, backend=backend, dtype=dtype, **arguments))
    exact = RKM(*sizes, backend="reference", dtype=torch.float64, **arguments)
    exact.load_state_dict(fast.state_dict())
    x, hidden, memory, context = problem(fast, steps, batch, dtype)
    padding = random_mask(mask, batch, steps)
    double = [c.double() for c in context] if context else None
    options = {"return_memory": True} if return_memory else {}
    options |= {"reset": random_reset(batch, steps)} if reset else {}
    wanted = forward_and_gradients(exact, x.double(), hidden.double(), memory.double(), double, padding, **options)
    moved = [t.to(device) for t in context] if context else None
    padding = None if padding is None else padding.to(device)
    options |= {"reset": options["reset"].to(device)} if reset else {}
    given = forward_and_gradients(
        fast.to(device), x.to(device), hidden.to(device), memory.to(device), moved, padding, **options
    )
    if dtype != torch.float64:
        given, wanted = join_scales(given), join_scales(wanted)
    for what, value in wanted.items():
        assert_close(given[what].cpu(), value, what, "tf32" if tf32 and dtype == torch.float32 else dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("ngram", "padding"), NGRAMS)
def test_all_variants(backend, cell, ngram, padding):
    variants = itertools.product((None, False), (False, True), (False, True), ("none", "mixed"))
    for feedback, layer_norm, bidirectional, mask in variants:
        compare(
            backend, mask=mask, cell=cell, ngram=ngram, ngram_padding=padding, feedback=feedback,
            layer_norm=layer_norm, bidirectional=bidirectional,
        )  # fmt: skip


EPISODES = [
    {"ngram": 1},
    {"ngram": 3, "mask": "mixed", "bidirectional": True},
    {"ngram": 3, "ngram_padding": "same", "num_layers": 2, "layer_norm": True},
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("arguments", EPISODES, ids=str)
def test_sequences_that_begin_anew_and_all_memories(backend, cell, arguments):
    for feedback in (None, False):
        compare(backend, cell=cell, feedback=feedback, reset=True, return_memory=True, steps=7, **arguments)


def check_missing_numbers_stay_where_they_are(backend, dtype=torch.float64, device="cpu", **arguments):
    """NaN and infinity at a real step are not seen at padding; at padding, or in its gradients, they are seen nowhere.

    Row 1 is padded on both sides, row 2 is padding alone.
    """
    rkm = randomized(RKM(3, 4, backend=backend, dtype=dtype, **arguments)).to(device)
    mask = torch.zeros(3, 6, dtype=torch.bool, device=device)
    mask[1, :1] = mask[1, 4:] = mask[2] = True
    padding = mask.t()
    for missing in (torch.nan, torch.inf):
        x = torch.randn(6, 3, 3, dtype=dtype).to(device)
        x[2, 1] = missing
        output, _ = rkm(x, padding_mask=mask)
        assert output[padding].eq(0).all()
        assert output[:, 0].isfinite().all()
        rows = rkm.num_layers * (1 + rkm.bidirectional)
        x = torch.randn(6, 3, 3, dtype=dtype).to(device)
        results = []
        for fill in (0.0, missing):
            leaves = [
                x.masked_fill(padding.unsqueeze(-1), fill),
                *torch.ones(2, rows, 3, 4, dtype=dtype, device=device),
            ]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            output, state = rkm(leaves[0], (leaves[1], leaves[2]), mask)
            grads = [torch.ones_like(t) for t in (output, state.hidden, state.cell)]
            grads[0] = grads[0].masked_fill(padding.unsqueeze(-1), fill)
            given = torch.autograd.grad([output, state.hidden, state.cell], [*leaves, *rkm.parameters()], grads)
            results.append([output, state.hidden, state.cell, *given])
        for i, (wanted, given) in enumerate(zip(*results, strict=True)):
            assert wanted.isfinite().all()
            assert torch.equal(wanted, given), f"result {i} with {missing} at padding"
        # The final state of a row that is padding alone is the initial one, whatever its gradient is.
        grads = [torch.full_like(t, missing) for t in (state.hidden, state.cell)]
        for grad in grads:
            grad[:, :2] = 1
        output, state = rkm(x, (leaves[1], leaves[2]), mask)
        given = torch.autograd.grad([state.hidden, state.cell], list(rkm.parameters()), grads, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in given)


MISSING = [
    {"cell": "lstm", "bidirectional": True},
    {"cell": "rkm_lstm", "num_layers": 2},
    {"cell": "rkm_lstm", "feedback": False},
    {"cell": "rkm_cifg", "layer_norm": True, "bidirectional": True},
    {"cell": "linear_kernel_gated", "memory_clip": 0.4},
    {"cell": "linear_kernel", "layer_norm": True, "feedback": False},
    {"cell": "ran", "ngram": 3},
    {"cell": "gated_cnn", "ngram": 3, "ngram_padding": "same"},
    {"cell": "cnn", "bidirectional": True, "layer_norm": True},
]


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("arguments", MISSING, ids=str)
def test_missing_numbers_stay_where_they_are(backend, arguments):
    check_missing_numbers_stay_where_they_are(backend, **arguments)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", ["left", "right"])
def test_learned_sigmas_and_two_layers(backend, cell, mask):
    # In this problem no scale's gradient, a sum over all steps and units, nearly cancels to mere rounding.
    for layer_norm in (False, True):
        compare(backend, mask=mask, cell=cell, learn_sigma=True, layer_norm=layer_norm, num_layers=2, seed=7)


def clear_bound(cell, steps, batch, sizes, dtype, feedback=None, **kernel):
    """For the problem of :func:`compare`, a ``memory_clip`` that clips, and that no value before it comes close to.

    A value that rounding takes across the bound has another gradient, which no tolerance covers.
    """

    def distance(clip):
        torch.manual_seed(0)
        rkm = randomized(RKM(*sizes, dtype=dtype, cell=cell, feedback=feedback, memory_clip=None, **kernel)).double()
        x, hidden, memory, _ = problem(rkm, steps, batch, dtype)
        weights, closest, clips = rkm._weights("l0", None), torch.inf, False
        hidden, memory = hidden[0].double(), memory[0].double()
        for window in x.double():
            _, free = reference.step(rkm._cell, window, weights, hidden, memory)
            closest = min(closest, (free.abs() / clip - 1).abs().min().item())
            clips = clips or bool((free.abs() > clip).any())
            hidden, memory = reference.step(rkm._cell.clipped(clip), window, weights, hidden, memory)
        return closest if clips else 0.0

    with torch.no_grad():
        return max(torch.linspace(0.3, 1.5, 80).tolist(), key=distance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mask", ["none", "mixed"])
def test_clipped_memory(backend, cell, mask):
    """The bound is such that some of the memory is clipped and some is not."""
    for feedback in (None, False):
        compare(backend, mask=mask, cell=cell, feedback=feedback, memory_clip=0.4, learn_sigma=True, bidirectional=True)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipped_memory_in_other_dtypes(backend, cell, dtype):
    shape = {"steps": 4, "batch": 2, "sizes": (6, 5)}
    compare(backend, dtype=dtype, cell=cell, memory_clip=clear_bound(cell, dtype=dtype, **shape), **shape)


def gradients_at_the_bound(backend, cell, feedback, dtype=torch.float64, device="cpu"):
    """Gradients of the biases where each unit's memory is, in this order: within its bound, at it, beyond it."""
    rkm = RKM(1, 3, cell=cell, feedback=feedback, memory_clip=0.5, forget_bias=0.0, backend=backend, dtype=dtype)
    with torch.no_grad():
        for parameter in rkm.parameters():
            parameter.zero_()
        # With gates and scales of one half, and no memory before, c_t is half of the candidate.
        candidate = torch.tensor([0.5, 1.0, 3.0])
        rkm.bias_l0[:3] = candidate.atanh() if rkm._cell.squash_candidate else candidate
    output, _ = rkm.to(device)(torch.zeros(1, 2, 1, dtype=dtype, device=device))
    (gradient,) = torch.autograd.grad(output.sum(), rkm.bias_l0)
    return gradient.unflatten(0, (-1, 3)).cpu()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", [name for name, row in CELLS.items() if not row.squash_candidate])
@pytest.mark.parametrize("feedback", [None, False])
def test_the_gradient_passes_at_the_bound_itself_and_not_beyond(backend, cell, feedback):
    given, wanted = (gradients_at_the_bound(name, cell, feedback) for name in (backend, "reference"))
    assert given[0].ne(0).tolist() == [True, True, False]
    assert_close(given, wanted)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_that_was_clipped_and_is_kept_whole_stands_at_the_bound(backend, dtype):
    """A forget gate that is 1 in the arithmetic carries the bound itself, through which the gradient passes."""

    def gradient(name):
        rkm = RKM(1, 2, cell="rkm_cifg", memory_clip=1.0, forget_bias=40.0, backend=name, dtype=dtype)
        memory = torch.ones(1, 1, 2).requires_grad_()
        _, state = rkm(torch.zeros(4, 1, 1, dtype=dtype), (torch.zeros(1, 1, 2, dtype=dtype), memory))
        return torch.autograd.grad(state.cell.sum(), memory)[0]

    assert gradient(backend).tolist() == gradient("reference").tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(backend, cell, dtype):
    for layer_norm in (False, True):
        for more in ({}, {"reset": True, "return_memory": True}):
            compare(backend, dtype=dtype, cell=cell, layer_norm=layer_norm, steps=7, batch=3, sizes=(6, 9), **more)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("steps", "batch", "sizes"), [(1, 1, (1, 1)), (63, 2, (7, 33)), (2, 17, (5, 3)), (0, 3, (2, 2)), (3, 0, (2, 2))]
)
def test_odd_sizes(backend, steps, batch, sizes):
    for cell in ("rkm_lstm", "rkm_cifg", "cnn"):
        compare(backend, steps=steps, batch=batch, sizes=sizes, cell=cell, ngram=3)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_gradcheck(backend, cell, feedback, layer_norm):
    rkm = randomized(
        RKM(2, 3, cell=cell, ngram=2, feedback=feedback, layer_norm=layer_norm, learn_sigma=True, backend=backend,
            dtype=torch.float64)
    )  # fmt: skip
    x, hidden, memory, context = problem(rkm, 3, 2, torch.float64)
    names = [name for name, _ in rkm.named_parameters()]
    mask = torch.tensor([[False, False, False], [False, False, True]])

    def run(x, hidden, memory, context, *parameters):
        arguments = (x, (hidden, memory, [context]), mask)
        output, state = torch.func.functional_call(rkm, dict(zip(names, parameters, strict=True)), arguments)
        return output, state.hidden, state.cell

    leaves = [x, hidden, memory, context[0], *rkm.parameters()]
    assert torch.autograd.gradcheck(run, [leaf.detach().clone().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("backend", FAST)
def test_a_backward_can_be_repeated_and_leaves_no_trace(backend):
    rkm = randomized(RKM(3, 4, backend=backend, dtype=torch.float64))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    output, _ = rkm(x)
    kept = output.detach().clone()
    (first,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(first, second)
    assert torch.equal(output, kept)


@pytest.mark.parametrize("backend", FAST)
def test_the_same_bits_on_a_repeated_run(backend):
    rkm = randomized(RKM(16, 16, backend=backend))
    x = torch.randn(9, 4, 16)
    assert torch.equal(rkm(x)[0], rkm(x)[0])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", CELLS)
def test_training_follows_the_reference(backend, cell):
    given, wanted = (training_losses(100, name, torch.float64, cell=cell) for name in (backend, "reference"))
    assert_close(given, wanted)
