"""Sequences that begin anew: the segments of a batch against each of them run alone, and against the mask's loop."""

import itertools

import pytest
import torch
from helpers import DEVICES, assert_close, join_scales
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.ops import Weights, anew, resolve_cell, segments
from fairseq_rkm.ops.ngram import extend, next_context, steps_ahead
from fairseq_rkm.ops.segments import Reset, _group_sizes

DOUBLE = torch.float64
D, M = 3, 2


@st.composite
def problems(draw):
    """A cell, shapes, which steps are real, and where rows begin anew."""
    name = draw(st.sampled_from(sorted(CELLS)))
    ngram, padding = draw(st.sampled_from([(1, "causal"), (2, "causal"), (4, "causal"), (3, "same"), (5, "same")]))
    steps, batch = draw(st.integers(0, 7)), draw(st.integers(1, 4))
    masks = st.lists(st.booleans(), min_size=steps * batch, max_size=steps * batch)
    reset = torch.tensor(draw(masks), dtype=torch.bool).view(steps, batch)
    keep = None
    if draw(st.booleans()):
        keep = torch.ones(steps, batch, dtype=torch.bool)
        for row in range(batch):
            first, last = sorted(draw(st.tuples(st.integers(0, steps), st.integers(0, steps))))
            keep[:first, row] = keep[last:, row] = False
    return {
        "cell": resolve_cell(name, draw(st.sampled_from([None, False]))),
        "ngram": ngram, "padding": padding, "keep": keep, "reset": reset,
        **{name: draw(st.booleans()) for name in ("layer_norm", "bias", "scales", "given", "fresh")},
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


def leaves_of(problem):
    """Random tensors for a problem by name; an absent one is None."""
    generator = torch.Generator().manual_seed(problem["seed"])
    cell, n, (steps, batch) = problem["cell"], problem["ngram"], problem["reset"].shape

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    norm, given_, fresh = problem["layer_norm"], problem["given"], problem["fresh"]
    scales = problem["scales"] and not norm  # a normalised memory hardly depends on its scale
    x = draw(steps, batch, M)
    if problem["keep"] is not None:
        x = x.masked_fill(~problem["keep"].unsqueeze(-1), 0)
    leaves = {
        "x": x,
        "input": draw(len(cell.gates) * D, n * M),
        "recurrent": draw(len(cell.recurrent_gates) * D, D) if cell.has_feedback else None,
        "bias": draw(len(cell.gates) * D) if problem["bias"] else None,
        "sigma_i": draw().sigmoid() if scales and cell.input_is_constant else None,
        "sigma_f": draw(D).sigmoid() if scales and cell.forget_is_constant else None,
        "norm_weight": draw(D) if norm else None,
        "norm_bias": draw(D) if norm else None,
        "hidden": draw(batch, D) if given_ else None,
        "memory": draw(batch, D) if given_ else None,
        "context": draw(n - 1, batch, M) if given_ and n > 1 else None,
        "fresh_hidden": draw(D) if fresh else None,
        "fresh_memory": draw(D) if fresh else None,
    }
    return {name: None if leaf is None else leaf.requires_grad_() for name, leaf in leaves.items()}


def weights_of(leaves):
    weights = Weights(**{name: leaves[name] for name in ("input", "recurrent", "bias", "norm_weight", "norm_bias")})
    scales = {name: leaves[name] for name in ("sigma_i", "sigma_f") if leaves[name] is not None}
    return weights._replace(**scales)


def with_gradients(problem, run, device="cpu"):
    """The results of ``run(problem, leaves, weights)`` and the gradients of a random projection of them."""
    leaves = {n: v if v is None else v.detach().to(device).requires_grad_() for n, v in leaves_of(problem).items()}
    moved = {n: v.to(device) if torch.is_tensor(v) else v for n, v in problem.items()}
    weights = weights_of(leaves)
    results = dict(zip(("output", "hidden", "memory", "context"), run(moved, leaves, weights), strict=False))
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(v.shape, generator=generator, dtype=DOUBLE).to(device) * v).sum() for v in results.values())
    loss = loss + 0 * leaves["x"].sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return results | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def by(backend):
    """Run a problem by a backend."""

    def run(problem, leaves, weights):
        n, padding, keep = problem["ngram"], problem["padding"], problem["keep"]
        inputs = extend(leaves["x"], n, padding, leaves["context"])
        results = anew.recurrence(
            problem["cell"], inputs, weights, D, leaves["hidden"], leaves["memory"], keep, backend,
            Reset(problem["reset"]), (leaves["fresh_hidden"], leaves["fresh_memory"]), steps_ahead(n, padding),
        )  # fmt: skip
        return *results, *([next_context(leaves["x"], n, leaves["context"], keep, problem["reset"])] if n > 1 else [])

    return run


def piece_by_piece(problem, leaves, weights):
    """Each row by itself, and in it each stretch from one reset to the next as a sequence of its own."""
    n, padding, (steps, batch) = problem["ngram"], problem["padding"], problem["reset"].shape
    nowhere = torch.zeros_like(problem["reset"])
    zeros = torch.zeros(1, D, dtype=DOUBLE)
    outputs, finals = [], []
    for row in range(batch):
        at = slice(row, row + 1)
        state = [zeros if leaves[k] is None else leaves[k][at] for k in ("hidden", "memory")]
        context = leaves["context"] if leaves["context"] is None else leaves["context"][:, at]
        cuts = [t for t in range(steps) if problem["reset"][t, row]]
        pieces = []
        for first, last in zip([0, *cuts], [*cuts, steps], strict=True):
            if first in cuts and (first, last) != (0, 0):
                fresh = [leaves[k] for k in ("fresh_hidden", "fresh_memory")]
                state, context = [zeros if f is None else f.unsqueeze(0) for f in fresh], None
            x, keep = leaves["x"][first:last, at], problem["keep"]
            keep = None if keep is None else keep[first:last, at]
            inputs = extend(x, n, padding, context)
            cut = Reset(nowhere[first:last, at])
            output, *state = anew.recurrence(problem["cell"], inputs, weights, D, *state, keep, "reference", cut)
            context = next_context(x, n, context, keep) if n > 1 else None
            pieces.append(output)
        outputs.append(torch.cat(pieces))
        finals.append([*state, *([] if context is None else [context])])
    hidden, memory, *contexts = zip(*finals, strict=True)
    return torch.cat(outputs, 1), torch.cat(hidden), torch.cat(memory), *(torch.cat(c, 1) for c in contexts)


def compare(given_, wanted):
    given_, wanted = join_scales(given_), join_scales(wanted)
    assert given_.keys() == wanted.keys()
    for what, value in wanted.items():
        assert_close(given_[what].cpu(), value, what)


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_the_reference_s_mask_is_each_piece_run_alone(problem):
    compare(with_gradients(problem, by("reference")), with_gradients(problem, piece_by_piece))


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_segments_by_a_backend_are_the_reference_s_mask(problem):
    compare(with_gradients(problem, by("batched")), with_gradients(problem, by("reference")))


@pytest.mark.gpu
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_segments_on_a_gpu_are_the_reference_s_mask(problem):
    compare(with_gradients(problem, by("auto"), "cuda"), with_gradients(problem, by("reference")))


@pytest.fixture
def unread(monkeypatch):
    monkeypatch.setattr(segments, "_may_read", lambda _mask: False)


@pytest.mark.usefixtures("unread")
@given(problem=problems())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_where_the_host_may_not_read_the_mask_the_reference_follows_it(problem):
    compare(with_gradients(problem, by("auto")), with_gradients(problem, by("reference")))


def random_problem(steps, batch, share, **changes):
    generator = torch.Generator().manual_seed(3)
    reset = torch.rand(steps, batch, generator=generator) < share
    problem = {
        "cell": resolve_cell("rkm_lstm"), "ngram": 1, "padding": "causal", "keep": None, "reset": reset,
        "layer_norm": False, "bias": True, "scales": False, "given": True, "fresh": True, "seed": 0,
    }  # fmt: skip
    return problem | changes


@pytest.mark.usefixtures("unread")
def test_a_named_backend_says_that_it_cannot_follow_an_unread_mask():
    problem = random_problem(5, 3, 0.3)
    with pytest.raises(RKMError, match=r"backend 'batched' cannot run this: the reset mask cannot be read here"):
        with_gradients(problem, by("batched"))


@pytest.mark.usefixtures("unread")
def test_a_single_step_needs_no_look_at_the_mask():
    for ngram in (1, 3):
        problem = random_problem(1, 6, 0.5, ngram=ngram)
        given_ = with_gradients(problem, by("batched"))
        compare(given_, with_gradients(problem, by("reference")))


def test_the_mask_is_left_as_it_is():
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2] = True
    kept = mask.clone()
    for reset in (mask.t(), mask.t().contiguous()):
        with_gradients(random_problem(5, 3, 0.0, reset=reset), by("batched"))
        assert torch.equal(mask, kept)


@pytest.mark.parametrize("backend", ["batched", "reference"])
@pytest.mark.parametrize("ngram", [1, 3])
def test_nothing_of_a_dropped_state_gets_through(backend, ngram):
    """NaN in a state, context or input has no effect behind the reset, forward or backward."""
    reset = torch.zeros(5, 2, dtype=torch.bool)
    reset[0, 0] = reset[2, 1] = True
    problem = random_problem(5, 2, 0, reset=reset, ngram=ngram)
    leaves = leaves_of(problem)
    weights = weights_of(leaves)

    def run():
        output, *_ = by(backend)(problem, leaves, weights)
        return output[:, 0], output[2:, 1], *torch.autograd.grad(output[:, 0].sum(), [leaves["x"], weights.input])

    clean = run()
    with torch.no_grad():
        for name in ("hidden", "memory", "context"):
            if leaves[name] is not None:
                leaves[name][..., 0, :] = torch.nan
    given_ = run()
    for value, wanted in zip(given_, clean, strict=True):
        assert torch.equal(value, wanted)
    with torch.no_grad():
        leaves["hidden"][1] = torch.inf  # row 1 goes on from it, up to its reset
    assert torch.equal(run()[1], clean[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtypes_of_states_are_kept(device, dtype):
    problem = random_problem(6, 3, 0.3)
    leaves = {n: v if v is None else v.detach().to(device, dtype) for n, v in leaves_of(problem).items()}
    weights = weights_of(leaves)
    moved = problem | {"reset": problem["reset"].to(device)}
    for backend in ("auto", "reference"):
        given_ = by(backend)(moved, leaves | {"memory": leaves["memory"].float()}, weights)
        assert [v.dtype for v in given_] == [dtype, dtype, torch.float32]


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_padding_at_most_doubles_the_work_and_groups_are_few(lengths):
    lengths = sorted(lengths, reverse=True)
    sizes = _group_sizes(torch.tensor(lengths).numpy())
    assert sum(sizes) == len(lengths)
    at, firsts = 0, []
    for size in sizes:
        group = lengths[at : at + size]
        assert size * group[0] <= 2 * sum(group)
        firsts.append(group[0])
        at += size
    assert all(2 * later < earlier for earlier, later in itertools.pairwise(firsts))


def test_segments_of_like_length_are_one_run(monkeypatch):
    runs = []
    run = anew.dispatch.recurrence
    monkeypatch.setattr(anew.dispatch, "recurrence", lambda *a, **k: runs.append(tuple(a[1].shape)) or run(*a, **k))
    reset = torch.zeros(70, 20, dtype=torch.bool)
    reset[30, 4] = True
    with_gradients(random_problem(70, 20, 0, reset=reset), by("batched"))
    assert runs == [(70, 21, M)]
    runs.clear()
    with_gradients(random_problem(70, 20, 0), by("batched"))  # nothing begins anew: as without a mask
    assert runs == [(70, 20, M)]
