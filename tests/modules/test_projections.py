"""Projections: the layer written out step by step, and ``nn.LSTM``'s, against every backend."""

import copy
import itertools

import pytest
import torch
from helpers import assert_close, forward_and_gradients, join_scales, random_mask, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_rkm import CELLS, RKM, RKMError, RKMState
from fairseq_rkm.modules import Stepper
from fairseq_rkm.ops import reference
from fairseq_rkm.ops.ngram import extend, next_context
from fairseq_rkm.ops.weights import Weights

DOUBLE = torch.float64
M, D, P = 3, 6, 2
VARIANTS = [
    {},
    {"cell": "lstm", "num_layers": 2, "bidirectional": True},
    {"cell": "rkm_cifg", "num_layers": 2, "ngram": 3, "layer_norm": True},
    {"cell": "rkm_lstm", "ngram": 3, "ngram_padding": "same", "bidirectional": True},
    {"cell": "linear_kernel", "learn_sigma": True, "bias": False},
    {"cell": "ran", "num_layers": 2},
    {"cell": "lstm", "feedback": False, "bidirectional": True},
    {"cell": "gated_cnn", "ngram": 2, "num_layers": 2},
]


def projected(dtype=DOUBLE, **arguments):
    return randomized(RKM(M, D, proj_size=P, dtype=dtype, **arguments))


def step_by_step(rkm, x, hidden, cell, context, mask):
    """The stack by the reference's single steps, on ``h_{t-1}`` of p numbers; as ``RKM.forward`` for time first."""
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else ~mask.t()
    hiddens, memories, contexts = [], [], []
    for layer in range(rkm.num_layers):
        x = x.masked_fill(~keep.unsqueeze(-1), 0)
        if context:
            contexts.append(next_context(x, rkm.ngram, context[layer], keep))
        outputs = []
        for suffix in rkm._suffixes:
            i = len(hiddens)
            h, c = hidden[i], cell[i]
            own = {kind: getattr(rkm, f"{kind}_l{layer}{suffix}") for kind in rkm._kinds}
            order = range(len(x)) if not suffix else reversed(range(len(x)))
            travelled = x if not suffix else x.flip(0)
            before = context[layer] if context and not suffix else None
            inputs = extend(travelled, rkm.ngram, rkm.ngram_padding, before)
            scales = {f"sigma_{s}": own[f"sigma_{s}_logit"].sigmoid() for s in ("i", "f") if f"sigma_{s}_logit" in own}
            weights = Weights(own["weight_ih"], bias=own.get("bias"), norm_weight=own.get("norm_weight"),
                              norm_bias=own.get("norm_bias"), **scales)  # fmt: skip
            outs = {}
            for number, t in enumerate(order):
                window = torch.cat([inputs[number + rkm.ngram - 1 - k] for k in range(rkm.ngram)], dim=1)
                fed = torch.zeros(x.size(1), len(rkm.gates), D, dtype=x.dtype)
                if "weight_hh" in own:
                    terms = (h @ own["weight_hh"].t()).unflatten(1, (-1, D))
                    rows = [rkm.gates.index(gate) for gate in rkm.recurrent_gates]
                    fed = fed.index_add(1, torch.tensor(rows), terms)
                features = torch.eye(fed[0].numel(), dtype=x.dtype)
                weighted = weights._replace(input=torch.cat([own["weight_ih"], features], dim=1))
                new, new_c = reference.step(rkm._cell, torch.cat([window, fed.flatten(1)], 1), weighted, h, c)
                new, real = new @ own["weight_hr"].t(), keep[t].unsqueeze(1)
                outs[t] = torch.where(real, new, 0.0)
                h, c = torch.where(real, new, h), torch.where(real, new_c, c)
            outputs.append(torch.stack([outs[t] for t in range(len(x))]))
            hiddens.append(h)
            memories.append(c)
        x = torch.cat(outputs, dim=-1)
    return x, RKMState(torch.stack(hiddens), torch.stack(memories), contexts or None)


class StepByStep(nn.Module):
    def __init__(self, rkm):
        super().__init__()
        self.rkm = rkm

    def named_parameters(self, *_arguments, **_options):
        return self.rkm.named_parameters()

    def forward(self, x, state, mask):
        context = state[2] if len(state) > 2 else None
        return step_by_step(self.rkm, x, state[0], state[1], context, mask)


def problem(rkm, steps, batch, dtype=DOUBLE):
    rows = rkm.num_layers * len(rkm._suffixes)
    context = None
    if rkm.ngram > 1:
        sizes = [rkm.layer_input_size(layer) for layer in range(rkm.num_layers)]
        context = [torch.randn(rkm.ngram - 1, batch, size, dtype=dtype) for size in sizes]
    return (
        torch.randn(steps, batch, M, dtype=dtype), torch.randn(rows, batch, P, dtype=dtype),
        torch.rand(rows, batch, D, dtype=dtype), context,
    )  # fmt: skip


def compare(rkm, mask, steps=5, dtype=DOUBLE, device="cpu", tolerance=None):
    given_problem = problem(rkm, steps, 4, dtype)
    padding = random_mask(mask, 4, steps)
    exact = StepByStep(copy.deepcopy(rkm).double())
    wanted = join_scales(forward_and_gradients(exact, *moved(given_problem, dtype=DOUBLE), padding))
    results = forward_and_gradients(rkm.to(device), *moved((*given_problem, padding), device))
    for name, value in join_scales(results).items():
        assert_close(value.cpu(), wanted[name], name, tolerance)


def moved(values, device="cpu", dtype=None):
    """Tensors, lists of them and None."""
    lists = [v if v is None or isinstance(v, list) else [v] for v in values]
    moved_lists = [v if v is None else [tensor.to(device, dtype) for tensor in v] for v in lists]
    return [m if v is None or isinstance(v, list) else m[0] for v, m in zip(values, moved_lists, strict=True)]


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "batched", "auto"])
def test_every_result_and_gradient_is_that_of_single_steps(arguments, backend):
    for mask in ("none", "mixed"):
        compare(projected(backend=backend, **arguments), mask)


@settings(max_examples=20)
@given(st.sampled_from(list(CELLS)), st.sampled_from(["left", "right", "mixed"]), st.integers(1, 4), st.integers(1, 3))
def test_any_cell_length_and_window(cell, mask, steps, ngram):
    compare(projected(cell=cell, ngram=ngram), mask, steps)


def test_single_precision_by_the_backend_for_cpus():
    compare(projected(torch.float32, cell="lstm", num_layers=2, ngram=2), "mixed", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("backend", ["auto", "batched"])
def test_single_precision_on_a_gpu(arguments, backend):
    for mask in ("none", "mixed"):
        rkm = projected(torch.float32, backend=backend, **arguments)
        compare(rkm, mask, dtype=torch.float32, device="cuda", tolerance="tf32")


@pytest.mark.parametrize("arguments", [v for v in VARIANTS if "bidirectional" not in v])
def test_a_sequence_cut_anywhere_is_the_sequence_whole(arguments):
    rkm = projected(**arguments)
    x = torch.randn(7, 4, M, dtype=DOUBLE)
    whole, final = rkm(x)
    for cut in (0, 1, 4, 7):
        first, state = rkm(x[:cut])
        second, last = rkm(x[cut:], state)
        assert_close(torch.cat([first, second]), whole)
        for given_, wanted in zip(last.tensors(), final.tensors(), strict=True):
            assert_close(given_, wanted)


def test_padding_holds_nothing():
    rkm = projected(num_layers=2, cell="lstm", bidirectional=True)
    x, hidden, cell, _ = problem(rkm, 5, 4)
    mask = random_mask("mixed", 4, 5)
    x[mask.t()] = torch.nan
    x.requires_grad_()
    output, state = rkm(x, (hidden, cell), mask)
    assert not output[mask.t()].any()
    assert torch.equal(state.hidden[:, -1], hidden[:, -1]), "a row without any step keeps its state"
    output.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 3, "bidirectional": True, "bias": False}])
def test_nn_lstm_s_projections_are_converted_both_ways(arguments):
    lstm = nn.LSTM(M, D, proj_size=P, dtype=DOUBLE, **arguments)
    loaded = RKM(M, D, cell="lstm", proj_size=P, dtype=DOUBLE, **arguments)
    loaded.load_state_dict(lstm.state_dict())
    rkm = RKM.from_lstm(lstm)
    x, hidden, cell, _ = problem(rkm, 5, 4)
    wanted, (wanted_hidden, wanted_cell) = lstm(x, (hidden, cell))
    for module in (rkm, loaded, rkm.to_lstm(), RKM.from_lstm(rkm.to_lstm())):
        output, (h, c) = module(x, (hidden, cell))
        assert_close(output, wanted)
        assert_close(h, wanted_hidden)
        assert_close(c, wanted_cell)
        assert_close(module(x)[0], lstm(x)[0])
    if rkm.bias:
        assert rkm.num_weights() == sum(p.numel() for n, p in lstm.named_parameters() if n.startswith("weight"))
    else:
        with pytest.raises(RuntimeError, match=r"Unexpected key.*stacked_candidate"):
            lstm.load_state_dict(rkm.state_dict())
        with pytest.raises(RKMError, match="do not say whose they are"):
            loaded.load_state_dict(dict(lstm.state_dict()))
    assert f"proj_size={P}" in repr(rkm)


def test_weight_dropout_acts_on_weight_hh_alone():
    rkm = RKM(M, D, proj_size=P, weight_dropout=0.5, dtype=DOUBLE)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(rkm.weight_hh_l0, 0.5)
    without = RKM(M, D, proj_size=P, dtype=DOUBLE)
    without.load_state_dict(rkm.state_dict())
    x = torch.randn(5, 4, M, dtype=DOUBLE)
    torch.manual_seed(1)
    assert_close(rkm(x)[0], torch.func.functional_call(without, {"weight_hh_l0": dropped}, (x,))[0])


def test_single_steps_of_a_decoder():
    rkm = projected(cell="ran", ngram=3).eval()
    x = torch.randn(5, 4, M, dtype=DOUBLE)
    wanted, final = rkm(x)
    step, state = Stepper(rkm), rkm(x[:0])[1]
    with torch.no_grad():
        for t in range(5):
            output, state = step(x[t : t + 1], state)
            assert_close(output, wanted[t : t + 1])
    for given_, one in zip(state.tensors(), final.tensors(), strict=True):
        assert_close(given_, one)


def test_derivatives_of_any_order_and_autocast():
    rkm = projected(cell="lstm")
    x = torch.randn(3, 2, M, dtype=DOUBLE, requires_grad=True)
    state = torch.randn(1, 2, P, dtype=DOUBLE, requires_grad=True), torch.randn(1, 2, D, dtype=DOUBLE)
    assert torch.autograd.gradgradcheck(lambda x, h: rkm(x, (h, state[1]))[0], (x, state[0]))
    single = copy.deepcopy(rkm).float()
    with torch.autocast("cpu"):
        output, (hidden, _) = single(x.float(), (state[0].float(), state[1].float()))
    assert output.dtype == hidden.dtype == torch.bfloat16
    assert_close(output, rkm(x, state)[0])


@pytest.mark.parametrize("arguments", [v for v in VARIANTS if v.get("cell") != "gated_cnn"])
def test_a_learned_start_is_a_given_one(arguments):
    rkm = projected(learn_initial_state=True, **arguments)
    x, mask = torch.randn(5, 4, M, dtype=DOUBLE), random_mask("mixed", 4, 5)
    start = rkm.initial_state(4)
    assert start.cell.any()
    assert start.hidden.any() == rkm.feedback
    results = [rkm(x, None, mask), rkm(x, start, mask)]
    parameters = list(rkm.parameters())
    gradients = [
        torch.autograd.grad(o.square().sum() + h.sin().sum() + c.sum(), parameters, materialize_grads=True)
        for o, (h, c) in results
    ]
    flat = [[output, *state.tensors(), *grads] for (output, state), grads in zip(results, gradients, strict=True)]
    for given_, wanted in zip(*flat, strict=True):
        assert_close(given_, wanted)
    assert rkm.initial_state().hidden.shape == (rkm.num_layers * len(rkm._suffixes), P)


@pytest.mark.parametrize("size", [-1, D, D + 1, 1.5, True])
def test_other_sizes_are_refused(size):
    with pytest.raises(RKMError, match=r"proj_size must be a whole number from 0.* below hidden_size \(6\)"):
        RKM(M, D, proj_size=size)
    with pytest.raises(RKMError, match=r"hidden must have shape \(layers \* directions, B, p\) = \(1, 4, 2\)"):
        projected()(torch.randn(5, 4, M, dtype=DOUBLE), (torch.zeros(1, 4, D), torch.zeros(1, 4, D)))
    with pytest.raises(RKMError, match=r"the hidden state must be floating-point numbers, not torch.int64"):
        projected()(torch.randn(5, 4, M, dtype=DOUBLE), (torch.zeros(1, 4, P, dtype=int), torch.zeros(1, 4, D)))
    with pytest.raises(RKMError, match=r"the inputs are on cpu but the hidden state on meta"):
        projected()(torch.randn(5, 4, M, dtype=DOUBLE), (torch.zeros(1, 4, P, device="meta"), torch.zeros(1, 4, D)))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 3]), st.sampled_from(["causal", "same"]), st.booleans(), st.booleans(), st.integers(0, 999)
)  # fmt: skip
def test_a_given_state_lasts_until_the_first_reset(ngram, padding, bidirectional, learned, seed):
    torch.manual_seed(seed)
    rkm = projected(
        cell="lstm", ngram=ngram, ngram_padding=padding, bidirectional=bidirectional, learn_initial_state=learned
    )
    x, hidden, cell, _ = problem(rkm, 5, 3)
    reset, mask = torch.rand(3, 5) < 0.3, torch.rand(3, 5) < 0.3
    output, state, memories = rkm(x, (hidden, cell), mask, reset=reset, return_memory=True)
    for row in range(3):
        cuts = [0, *(t for t in range(1, 5) if reset[row, t]), 5]
        for first, last in itertools.pairwise(cuts):
            # The backward direction starts from the given state at the row's end, unless a reset is at its last part.
            starts = rkm.initial_state(1)
            begun, ended = reset[row, 0] if first == 0 else True, last < 5
            h, c = starts.hidden.clone(), starts.cell.clone()
            for direction, fresh in enumerate((begun, ended)[: 1 + bidirectional]):
                if not fresh:
                    h[direction], c[direction] = hidden[direction, row], cell[direction, row]
            wanted, final, wanted_memories = rkm(
                x[first:last, row : row + 1], (h, c), mask[row : row + 1, first:last], return_memory=True
            )
            assert_close(output[first:last, row : row + 1], wanted)
            assert_close(memories[first:last, row : row + 1], wanted_memories)
            for direction in range(1 + bidirectional):
                if last == 5 if direction == 0 else first == 0:
                    for whole, part in zip(state, final, strict=True):
                        assert_close(whole[direction, row : row + 1], part[direction])
