"""``torch.func`` and derivatives of derivatives, as people use them, against one sample or model at a time."""

import copy

import pytest
import torch
from helpers import assert_close, randomized
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint

from fairseq_rkm import RKM, RKMState

MODELS = [
    {"cell": "lstm", "batch_first": True},
    {"cell": "rkm_lstm", "num_layers": 2, "bidirectional": True, "ngram": 3},
    {"cell": "rkm_cifg", "layer_norm": True, "ngram": 2, "num_layers": 2},
    {"cell": "linear_kernel", "learn_sigma": True},
    {"cell": "gated_cnn", "ngram": 3, "ngram_padding": "same"},
    {"cell": "ran", "feedback": False, "bias": False},
]
each_model = pytest.mark.parametrize("arguments", MODELS, ids=lambda a: a["cell"])
SAMPLES, BATCH, STEPS = 3, 2, 3


def model_of(arguments, seed=0):
    return randomized(RKM(3, 4, dtype=torch.float64, **arguments), seed)


def sequences(rkm, *leading):
    shape = (BATCH, STEPS) if rkm.batch_first else (STEPS, BATCH)
    return torch.randn(*leading, *shape, 3, dtype=torch.float64)


def weights_of(rkm):
    return {name: p.detach() for name, p in rkm.named_parameters()}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@each_model
def test_vmap_over_inputs_states_and_masks(arguments):
    rkm = model_of(arguments)
    x, masks = sequences(rkm, SAMPLES), torch.rand(SAMPLES, BATCH, STEPS) < 0.3
    masks[:, 0] = False
    states = [rkm(sequences(rkm))[1] for _ in range(SAMPLES)]
    stacked = RKMState(*(torch.stack(parts) for parts in zip(*((s.hidden, s.cell) for s in states), strict=True)))
    contexts = None
    if rkm.ngram > 1:
        contexts = [torch.stack(parts) for parts in zip(*(s.context for s in states), strict=True)]

    def call(x, mask, hidden, cell, context):
        output, state = rkm(x, RKMState(hidden, cell, context), mask)
        return output, *state.tensors()

    over = 0, 0, 0, 0, None if contexts is None else 0
    given = vmap(call, over)(x, masks, stacked.hidden, stacked.cell, contexts)
    for i, state in enumerate(states):
        wanted = call(x[i], masks[i], *(state.hidden, state.cell, state.context))
        for result, one in zip(given, wanted, strict=True):
            assert_close(result[i], one)
    assert_close(vmap(lambda mask: rkm(x[0], None, mask)[0])(masks)[1], rkm(x[0], None, masks[1])[0])


@each_model
def test_vmap_over_models(arguments):
    models = [model_of(arguments, seed) for seed in range(SAMPLES)]
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = sequences(models[0])
    given = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,))[0])(parameters, buffers)
    assert_close(given, torch.stack([model(x)[0] for model in models]))
    given[1].square().sum().backward()
    wanted = torch.autograd.grad(models[1](x)[0].square().sum(), list(models[1].parameters()))
    assert_close(flat(p.grad[1] for p in parameters.values()), flat(wanted))


@each_model
def test_gradients_of_each_sample(arguments):
    """With padding, in which there is NaN."""
    rkm = model_of(arguments)
    parameters, samples = weights_of(rkm), sequences(rkm, SAMPLES)
    masks = torch.zeros(SAMPLES, BATCH, STEPS, dtype=torch.bool)
    masks[0, 0, -1] = masks[1, 1, 0] = True
    samples[masks if rkm.batch_first else masks.transpose(1, 2)] = torch.nan

    def loss(parameters, x, mask):
        output, state = functional_call(rkm, parameters, (x, None, mask))
        return output.square().sum() + state.hidden.sin().sum() + state.cell.cos().sum()

    given = vmap(grad(loss), (None, 0, 0))(parameters, samples, masks)
    for i in range(SAMPLES):
        wanted = torch.autograd.grad(loss(dict(rkm.named_parameters()), samples[i], masks[i]), list(rkm.parameters()))
        assert_close(flat(g[i] for g in given.values()), flat(wanted))


@each_model
def test_jacobians_hessians_and_directions(arguments):
    rkm = model_of(arguments)
    x, tangent = sequences(rkm), sequences(rkm)

    def output(x):
        return rkm(x)[0]

    def loss(x):
        return output(x).square().sum()

    jacobian = torch.autograd.functional.jacobian(output, x)
    pushed = torch.tensordot(jacobian, tangent, dims=3)
    cotangent = torch.randn_like(pushed)
    for given in (jacrev(output)(x), jacfwd(output)(x)):
        assert_close(given, jacobian)
    assert_close(jvp(output, (x,), (tangent,))[1], pushed)
    assert_close(torch.autograd.functional.jvp(output, x, tangent)[1], pushed)
    assert_close(vjp(output, x)[1](cotangent)[0], torch.tensordot(cotangent, jacobian, dims=3))
    second = torch.autograd.functional.hessian(loss, x)
    assert_close(hessian(loss)(x), second)
    product = torch.tensordot(second, tangent, dims=3)
    assert_close(jvp(grad(loss), (x,), (tangent,))[1], product)
    assert_close(torch.autograd.functional.hvp(loss, x, tangent)[1], product)


@each_model
def test_penalties_on_gradients_within_checkpoints_and_with_padding(arguments):
    """The derivatives are those of finite differences: ``gradcheck`` of a function that is a gradient."""
    rkm = model_of(arguments)
    mask = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    mask[0, -2:] = True

    def penalty(x):
        output = checkpoint(lambda x: rkm(x, None, mask)[0], x, use_reentrant=False)
        (first,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return (first.norm() - 1) ** 2

    assert torch.autograd.gradcheck(penalty, sequences(rkm).requires_grad_())


def test_many_gradients_and_directions_at_once():
    rkm = model_of({"bidirectional": True})
    x = sequences(rkm).requires_grad_()
    assert_close(linearize(lambda x: rkm(x)[0], x)[1](x), jvp(lambda x: rkm(x)[0], (x,), (x,))[1])
    output = rkm(x)[0]
    directions = torch.randn(SAMPLES, *output.shape, dtype=torch.float64)
    (given,) = torch.autograd.grad(output, x, directions, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(output, x, direction, retain_graph=True)[0] for direction in directions]
    assert_close(given, torch.stack(wanted))


@pytest.mark.parametrize("arguments", [{"num_layers": 2, "dropout": 0.5}, {"weight_dropout": 0.5}])
def test_random_masks_are_each_sample_s_own_or_all_samples(arguments):
    rkm = model_of({"cell": "lstm", **arguments})
    x = sequences(rkm).expand(SAMPLES, -1, -1, -1)
    torch.manual_seed(1)
    wanted = rkm(x[0])[0]
    torch.manual_seed(1)
    same = vmap(lambda x: rkm(x)[0], randomness="same")(x)
    assert_close(same, wanted.expand_as(same))
    parameters, different = weights_of(rkm), {"randomness": "different"}
    outputs = vmap(lambda x: rkm(x)[0], **different)(x)
    gradients = vmap(grad(lambda p, x: functional_call(rkm, p, (x,))[0].sum()), (None, 0), **different)(parameters, x)
    for values in (outputs, gradients["weight_hh_l0"]):
        assert not torch.equal(values[0], values[1])
    if rkm.weight_dropout:
        zeros = gradients["weight_hh_l0"] == 0
        assert zeros.any()
        assert not torch.equal(zeros[0], zeros[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: rkm(x)[0])(x)
    assert_close(vmap(lambda x: rkm.eval()(x)[0])(x)[0], rkm(x[0])[0])


def test_meta_learning_by_gradients_that_are_differentiated():
    """MAML: the outer gradient passes through the inner step. By ``torch.func`` it is the same."""
    rkm = nn.ModuleDict({"rnn": model_of({"cell": "rkm_cifg"}), "out": nn.Linear(4, 1, dtype=torch.float64)})
    x, y = torch.randn(2, STEPS, BATCH, 3, dtype=torch.float64), torch.randn(2, STEPS, BATCH, 1, dtype=torch.float64)
    parameters = dict(rkm.named_parameters())

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = rkm

        def forward(self, x):
            return self.parts["out"](self.parts["rnn"](x)[0])

    model = Whole()

    def loss(parameters, i):
        named = {f"parts.{name}": p for name, p in parameters.items()}
        return nn.functional.mse_loss(functional_call(model, named, (x[i],)), y[i])

    def adapted(parameters, gradients):
        return {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}

    inner = torch.autograd.grad(loss(parameters, 0), list(parameters.values()), create_graph=True)
    given = torch.autograd.grad(loss(adapted(parameters, inner), 1), list(parameters.values()))
    plain = {name: p.detach() for name, p in parameters.items()}
    wanted = grad(lambda p: loss(adapted(p, grad(loss)(p, 0).values()), 1))(plain)
    assert_close(flat(given), flat(wanted.values()))
