"""No tensor but a plain one in memory reaches a kernel: others go to operators or the reference, or are refused."""

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from helpers import assert_close, randomized
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops.backends.native import native
from fairseq_rkm.ops.plain_tensors import are_plain, obstacle

compiled = pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
FAST = ["batched", pytest.param("native", marks=compiled)]
STACK = {"num_layers": 2, "bidirectional": True, "ngram": 3, "layer_norm": True}


def pair(**arguments):
    """A module by ``"auto"``, and the same by the reference."""
    rkm = randomized(RKM(3, 4, **arguments))
    exact = copy.deepcopy(rkm)
    exact.backend = "reference"
    return rkm, exact


def output_of(rkm):
    """The module's output as a function of parameters and inputs."""
    return lambda parameters, x: functional_call(rkm, parameters, (x,))[0]


def parameters_of(rkm):
    return {name: p.detach() for name, p in rkm.named_parameters()}


@pytest.mark.parametrize("arguments", [{}, STACK, {"cell": "lstm", "memory_clip": 1.0}])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_records_the_function(arguments, mode, pre_dispatch):
    rkm, exact = pair(**arguments)
    x, parameters = torch.randn(4, 2, 3), parameters_of(rkm)
    recorded = make_fx(output_of(rkm), tracing_mode=mode, pre_dispatch=pre_dispatch)(parameters, x)
    others = {name: 0.5 * p for name, p in parameters.items()}
    assert_close(recorded(others, -x), output_of(exact)(others, -x))


def test_fake_and_meta_tensors_have_shapes():
    with FakeTensorMode():
        rkm = RKM(3, 4, **STACK)
        output, _ = rkm(torch.randn(5, 2, 3))
        output.sum().backward()
    assert output.shape == (5, 2, 8)
    assert all(p.grad.shape == p.shape for p in rkm.parameters())
    with torch.device("meta"):
        assert RKM(3, 4, **STACK)(torch.randn(5, 2, 3))[1].hidden.shape == (4, 2, 4)


@compiled
def test_fake_tensors_do_not_reach_c():
    """Which would end Python: hence a process of its own."""
    program = (
        "import torch; from fairseq_rkm import RKM; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "real = RKM(3, 4)\n"
        "mode = FakeTensorMode(allow_non_fake_inputs=True)\n"
        "with mode: fake = mode.from_tensor(torch.zeros(2, 1, 3)); real(fake)\n"
        "print(RKM(3, 4, backend='native')(fake)[0].shape)\n"
        "output = real(torch.zeros(2, 1, 3))[0].sum()\n"
        "with mode: output.backward()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode >= 0, "killed by a signal"
    assert result.stdout == "torch.Size([2, 1, 4])\n", result.stderr


def test_torch_func_is_right_by_default():
    rkm, exact = pair(**STACK)
    x, parameters, tangent = torch.randn(4, 2, 3), parameters_of(rkm), torch.randn(4, 2, 3)
    inputs, stacked = torch.stack([x, -x]), {name: torch.stack([p, 0.5 * p]) for name, p in parameters_of(rkm).items()}
    results = []
    for module in (rkm, exact):
        function = output_of(module)

        def loss(parameters, x, function=function):
            return function(parameters, x).square().sum()

        pushed = jvp(lambda x, f=function: f(parameters, x), (x,), (tangent,))
        per_sample = vmap(grad(loss), (None, 0))(parameters, inputs)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(function(parameters, forward_ad.make_dual(x, tangent)))
        results.append([
            *grad(loss)(parameters, x).values(), *per_sample.values(), vmap(function)(stacked, inputs), *pushed,
            dual.tangent,
        ])  # fmt: skip
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted)
    one_by_one = [grad(lambda p, x: output_of(exact)(p, x).square().sum())(parameters, each) for each in inputs]
    vectors = [nn.utils.parameters_to_vector(each.values()) for each in one_by_one]
    per_sample = vmap(grad(lambda p, x: output_of(rkm)(p, x).square().sum()), (None, 0))(parameters, inputs)
    assert_close(torch.cat([g.flatten(1) for g in per_sample.values()], dim=1), torch.stack(vectors))


class Alone(nn.Module):
    """A module with a single result, as ``torch.jit.trace`` wants it."""

    def __init__(self, rkm):
        super().__init__()
        self.rkm = rkm

    def forward(self, x):
        return self.rkm(x)[0]


@pytest.mark.parametrize("backend", FAST)
def test_a_backend_asked_for_by_name_refuses_what_it_cannot_see(backend):
    rkm, x = RKM(3, 4, backend=backend), torch.randn(4, 2, 3)
    parameters, function = parameters_of(rkm), output_of(rkm)
    with pytest.raises(RKMError, match=rf"'{backend}' cannot run this: torch\.func"):
        vmap(lambda x: function(parameters, x))(x.unsqueeze(0))
    with pytest.raises(RKMError, match=r"cannot run this: torch\.jit\.trace"), pytest.warns():
        torch.jit.trace(Alone(rkm), (x,))
    with forward_ad.dual_level(), pytest.raises(RKMError, match="cannot run this: forward-mode"):
        rkm(forward_ad.make_dual(x, x))
    with pytest.raises(RKMError, match="one is a Tensor of layout"):
        rkm(torch._neg_view(x))


@pytest.mark.parametrize("backend", FAST)
def test_a_mode_that_follows_operators_changes_no_number(backend):
    """Forward, backward, or both under a mode; a backend asked for by name is an operator there."""
    rkm, exact = pair(cell="lstm", learn_sigma=True, layer_norm=True, ngram=2)
    rkm.backend = backend
    x, parameters = torch.randn(4, 2, 3), list(rkm.parameters())
    wanted = torch.autograd.grad(exact(x)[0].square().sum(), list(exact.parameters()))
    for modes in ((True, True), (True, False), (False, True)):
        forward, backward = (FlopCounterMode(display=False) if mode else nullcontext() for mode in modes)
        with forward:
            loss = rkm(x)[0].square().sum()
        with backward:
            given = torch.autograd.grad(loss, parameters)
        for ours, theirs in zip(given, wanted, strict=True):
            assert_close(ours, theirs)
        counters = [mode for mode in (forward, backward) if isinstance(mode, FlopCounterMode)]
        assert all(counter.get_total_flops() > 0 for counter in counters)


def test_a_negated_view_is_read_as_what_it_is():
    rkm, exact = pair()
    x = torch.complex(torch.randn(4, 2, 3), torch.randn(4, 2, 3))
    assert x.conj().imag.is_neg()
    assert_close(rkm(x.conj().imag)[0], exact(-x.imag)[0])


def test_what_is_plain_and_what_is_not():
    x = torch.randn(3, 4)
    with torch.inference_mode():
        inference = torch.randn(3)
    plain = x, nn.Parameter(x), x.t(), x[:, 1], x.expand(2, 3, 4), x[:0], inference, x.double(), x > 0
    assert are_plain(*plain, None)
    with FakeTensorMode():
        fake = torch.zeros(3)
        assert not are_plain(x)
    meta = torch.zeros(3, device="meta")
    assert [are_plain(tensor) for tensor in (fake, meta, meta[1:])] == [False] * 3
    assert [obstacle(tensor) for tensor in (*plain, None, fake, meta)] == [None] * 12

    class Negated(torch.Tensor):
        """One that says itself what operators do to it."""

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    odd = x.to_sparse(), x.to_mkldnn(), torch._neg_view(x), torch._efficientzerotensor(3), x.as_subclass(Negated)
    for tensor in odd:
        assert not are_plain(tensor)
        assert "it takes tensors that lie in memory" in obstacle(tensor), type(tensor)


def strided(tensor):
    """The same values at another stride, with NaN between."""
    if not tensor.is_floating_point():
        return torch.stack([tensor, ~tensor], dim=-1)[..., 0]
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("cell", ["rkm_lstm", "linear_kernel"])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_any_stride_is_read_right(backend, cell, layer_norm, steps):
    rkm, exact = pair(cell=cell, layer_norm=layer_norm, learn_sigma=True)
    rkm.backend = backend
    mask = torch.zeros(2, steps, dtype=torch.bool)
    mask[1, -1] = True
    x, state, weights = torch.randn(steps, 2, 3), torch.randn(2, 1, 2, 4), torch.randn(steps, 2, 4)
    results = []
    for module, change in ((rkm, strided), (exact, torch.clone)):
        leaves = [t.detach().requires_grad_() for t in (change(x), *map(change, state))]
        parameters = {name: change(p.detach()).requires_grad_() for name, p in module.named_parameters()}
        arguments = leaves[0], (leaves[1], leaves[2]), change(mask)
        output, final = functional_call(module, parameters, arguments)
        gradients = torch.autograd.grad(
            [output, final.hidden, final.cell], [*leaves, *parameters.values()],
            [change(weights), change(weights[:1]), change(weights[:1] + 1)],
        )  # fmt: skip
        results.append([output, final.hidden, final.cell, *gradients])
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted)
