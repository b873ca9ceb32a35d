"""The short way through a batch: it gives what the long way gives, to the bit, and leaves all else to it."""

import itertools

import pytest
import torch
from helpers import DEVICES, assert_close, forward_and_gradients, randomized, watch_short_way
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fairseq_rkm import CELLS, RKM, RKMError, RKMState
from fairseq_rkm.modules import plain_calls
from fairseq_rkm.modules import rkm as module
from fairseq_rkm.ops import BACKENDS, dispatch, eager
from fairseq_rkm.ops.backends.native import native

compiled = pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")


@pytest.fixture
def ways(monkeypatch):
    """Which way each call has gone."""
    monkeypatch.setattr(module, "take_steps", lambda *_: None)
    return watch_short_way(monkeypatch, "run_layer")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
def test_it_gives_what_the_long_way_gives(cell, device, ways, monkeypatch):
    options = itertools.product((None, False), (False, True), (False, True), (True, False))
    for feedback, layer_norm, batch_first, bias in options:
        rkm = RKM(
            3, 5, cell=cell, feedback=feedback, layer_norm=layer_norm, batch_first=batch_first, bias=bias,
            sigma_i2=0.3, sigma_f2=0.7,
        )  # fmt: skip
        rkm = randomized(rkm).to(device)
        x = torch.randn(*((4, 6, 3) if batch_first else (6, 4, 3)), device=device)
        state = rkm.initial_state(4).map(lambda t: torch.randn(t.shape, dtype=t.dtype, device=device))
        ways.clear()
        given = every_result(rkm, x, state)
        assert ways == ["short"] * 3
        with monkeypatch.context() as patch:
            patch.setattr(module, "run_layer", lambda *_: None)
            wanted = every_result(rkm, x, state)
        assert given.keys() == wanted.keys()
        for name, result in given.items():
            assert torch.equal(result, wanted[name]), (name, cell, feedback, layer_norm, batch_first, bias)


def every_result(rkm, x, state):
    """Outputs, final states and gradients: from a state and without one, and without gradients to compute."""
    with torch.no_grad():
        output, final = rkm(x)
    assert type(final) is RKMState
    alone = torch.autograd.grad(rkm(x)[0].square().sum(), rkm.parameters(), allow_unused=True, materialize_grads=True)
    results = {"output alone": output, "h alone": final.hidden, "c alone": final.cell}
    results |= {f"gradient {number} alone": g for number, g in enumerate(alone)}

    def pairs(*arguments, **options):  # the test's helper gives three
        (x, (hidden, memory, _), _) = arguments
        return rkm(x, (hidden, memory), **options)

    pairs.named_parameters = rkm.named_parameters
    return results | forward_and_gradients(pairs, x, *state, None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bidirectional": True}, {"ngram": 2}, {"proj_size": 2}, {"cell": "linear_kernel", "learn_sigma": True},
        {"weight_dropout": 0.5}, {"num_layers": 2}, {"learn_initial_state": True}, {"kernel": "gaussian"},
        {"state_dropout": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_other_layers_go_the_long_way(arguments, ways):
    rkm = RKM(3, 4, **arguments)
    rkm(torch.randn(5, 2, 3))
    rkm(torch.randn(5, 2, 3), rkm.initial_state(2))
    assert ways == ["long"] * 2


def test_other_calls_go_the_long_way(ways):
    rkm, x = RKM(3, 4), torch.randn(5, 2, 3)
    state = rkm.initial_state(2)
    rkm(x[:, 0])
    rkm(x, list(state))
    rkm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rkm(x, state)
    parametrizations.weight_norm(rkm, "weight_hh_l0")
    rkm(x)
    assert ways == ["long"] * 5
    ways.clear()
    rkm(x, padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    rkm(x, reset=torch.zeros(2, 5, dtype=torch.bool))
    rkm(x, return_memory=True)
    assert not ways


@pytest.mark.parametrize("backend", ["auto", "batched", "reference"])
def test_named_backends_and_dropped_weights_out_of_training_go_the_short_way(backend, ways):
    rkm, exact = RKM(3, 4, backend=backend, weight_dropout=0.5, dropout=0.5).eval(), RKM(3, 4, backend="reference")
    exact.load_state_dict(rkm.state_dict())
    x = torch.randn(5, 2, 3)
    assert_close(rkm(x)[0], exact(x)[0])
    assert ways == ["short"] * 2


def test_what_does_not_fit_is_refused_as_ever(ways):
    rkm, state = RKM(3, 4), RKM(3, 4).initial_state(2)
    for _ in range(2):
        rkm(torch.randn(5, 2, 3), state)
        for x, given, message in (
            (torch.randn(5, 2, 5), None, "with m = 3, not"),
            (torch.randn(5, 3, 3), state, "hidden must have shape"),
            (torch.randn(5, 2, 3).double(), None, r"torch\.float64 but the weights"),
            (torch.randn(5, 2, 3), (state.hidden, state.cell.long()), "memory must be floating-point"),
            (torch.randn(5, 2, 3), (state.hidden, 1.0), "cell must be one tensor"),
            (torch.randn(5, 2, 3), RKMState(*state, [torch.zeros(1, 2, 3)]), "context must be None"),
            (torch.zeros(5, 2, 3, dtype=torch.int64), None, "the inputs are torch.int64"),
        ):
            with pytest.raises(RKMError, match=message):
                rkm(x, given)
    kept = rkm.weight_hh_l0
    rkm.weight_hh_l0 = nn.Parameter(torch.zeros(16, 5))
    with pytest.raises(RKMError, match="recurrent weights must be of shape"):
        rkm(torch.randn(5, 2, 3))
    rkm.weight_hh_l0 = kept
    rkm.bias_l0.data = rkm.bias_l0.data.double()
    with pytest.raises(RKMError, match=r"but the biases torch\.float64"):
        rkm(torch.randn(5, 2, 3))


def test_weights_that_change_in_any_way_count():
    rkm, x = RKM(3, 4), torch.randn(5, 2, 3)
    results = [rkm(x)[0]]
    rkm.weight_hh_l0.data.mul_(2)
    results.append(rkm(x)[0])
    rkm.weight_hh_l0.data = torch.randn(4, 16).t()  # not contiguous
    results.append(rkm(x)[0])
    rkm.weight_hh_l0 = nn.Parameter(torch.randn(16, 4))
    results.append(rkm(x)[0])
    exact = RKM(3, 4, backend="reference")
    exact.load_state_dict(rkm.state_dict())
    assert_close(results[-1], exact(x)[0])
    rkm.double()
    results.append(rkm(x.double())[0])
    assert_close(results[-1], exact.double()(x.double())[0])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(results))


@pytest.mark.parametrize("backend", ["batched", pytest.param("native", marks=compiled)])
@pytest.mark.parametrize("state", [False, True])
def test_plain_calls_and_operators_give_the_same_bits(backend, state):
    for name, cell in CELLS.items():
        rkm = randomized(RKM(3, 5, cell=name, backend=backend))
        leaves = {"x": torch.randn(6, 4, 3), "h": torch.randn(1, 4, 5), "c": torch.randn(1, 4, 5)}
        wanted = [*(leaf.requires_grad_() for leaf in leaves.values()), *rkm.parameters()]
        pair = (leaves["h"], leaves["c"]) if state else None
        by_call = rkm(leaves["x"], pair)
        rows = (None, None) if pair is None else (leaves["h"][0], leaves["c"][0])
        weights = plain_calls.layer_weights(rkm, 0)
        output, *final = BACKENDS[backend].operator.forward(rkm._cell, leaves["x"], weights, *rows, None)
        runs = []
        for results in ((by_call[0], by_call[1][0][0], by_call[1][1][0]), (output, *final)):
            loss = sum((r * torch.linspace(-1, 1, r.numel()).view_as(r)).sum() for r in results)
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            runs.append([*results, *gradients])
        for given, expected in zip(*runs, strict=True):
            assert torch.equal(given, expected), (cell.name, given - expected)


def follow_by_trace(rkm, x):
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.rkm = rkm

        def forward(self, x):
            return self.rkm(x)[0]

    return torch.jit.trace(Alone(), (x,), check_trace=False)(x)


def forward_derivative(rkm, x):
    with forward_ad.dual_level():
        return rkm(forward_ad.make_dual(x, x))[0]


def count(rkm, x):
    with FlopCounterMode(display=False):
        return rkm(x)[0]


FOLLOWERS = {
    "vmap": lambda rkm, x: vmap(lambda x: rkm(x.unsqueeze(1))[0], 1)(x),
    "grad": lambda rkm, x: grad(lambda x: rkm(x)[0].sum())(x),
    "functional_call and vmap": lambda rkm, x: vmap(
        lambda bias: functional_call(rkm, {"bias_l0": bias}, (x,))[0]
    )(torch.zeros(2, 16)),
    "forward mode": forward_derivative,
    "torch.jit.trace": follow_by_trace,
    "make_fx": lambda rkm, x: make_fx(lambda x: rkm(x)[0])(x),
    "a dispatch mode": count,
    "torch.compile": lambda rkm, x: torch.compile(rkm, backend="aot_eager", fullgraph=True)(x)[0],
    "a subclass": lambda rkm, x: rkm(TwoTensor(x, x))[0],
    "a negative view": lambda rkm, x: rkm(torch._neg_view(x))[0],
    "a fake tensor": lambda rkm, x: rkm(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x))[0],
    "a meta tensor": lambda rkm, x: rkm.to("meta")(x.to("meta"))[0],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's, and the compiler's own
@pytest.mark.parametrize("tool", FOLLOWERS)
def test_kernels_are_left_alone_whenever_something_follows(tool, monkeypatch):
    rkm, x, ran = RKM(3, 4), torch.randn(5, 2, 3), []
    rkm(x)  # the problem is proven by now
    run = eager.run
    monkeypatch.setattr(dispatch.eager, "run", lambda *problem: ran.append(problem) or run(*problem))
    FOLLOWERS[tool](rkm, x)
    assert not ran
    if tool != "a meta tensor":
        rkm(x)
        assert len(ran) == 1


@pytest.mark.parametrize("wanted", ["x", "h", "c", "weight_ih_l0", "weight_hh_l0", "bias_l0"])
def test_any_one_gradient_alone_and_second_derivatives(wanted):
    rkm, exact = RKM(3, 4).double(), RKM(3, 4, backend="reference").double()
    exact.load_state_dict(rkm.state_dict())
    tensors = {"x": torch.randn(5, 2, 3), "h": torch.randn(1, 2, 4), "c": torch.randn(1, 2, 4)}
    results = []
    for layer in (rkm, exact):
        layer.requires_grad_(False)
        own = {**{name: tensor.double() for name, tensor in tensors.items()}, **dict(layer.named_parameters())}
        leaf = own[wanted].requires_grad_()
        output, state = layer(own["x"], (own["h"], own["c"]))
        loss = output.sin().sum() + state.hidden.square().sum() + state.cell.sin().sum()
        first = torch.autograd.grad(loss, leaf, create_graph=True)[0]
        results.append([loss, first, torch.autograd.grad(first.square().sum(), leaf)[0]])
        leaf.requires_grad_(False)
    for given, expected in zip(*results, strict=True):
        assert_close(given, expected)
