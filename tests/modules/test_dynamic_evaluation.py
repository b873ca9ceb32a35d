import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_rkm import RKMError
from fairseq_rkm.modules.dynamic_evaluation import DIVERGED, DynamicEvaluation

EPSILON = 1e-3


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).double()
    model[0].weight.requires_grad = seed % 3 > 0
    return model


def loss(model, words):
    return nn.functional.cross_entropy(model(words[:-1]), words[1:])


def by_hand(model, training, text, rate, decay):
    """Algorithm of the paper's sections 4 and 5, one weight at a time; the losses of the text's segments."""
    weights = [w for w in model.parameters() if w.requires_grad]
    trained = [w.flatten().tolist() for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    for words in training:
        model.zero_grad()
        loss(model, words).backward()
        squares = [s + w.grad**2 / len(training) for s, w in zip(squares, weights, strict=True)]
    every = [math.sqrt(value) for s in squares for value in s.flatten().tolist()]
    mean = sum(every) / len(every)
    losses = []
    for words in text:
        model.zero_grad()
        scored = loss(model, words)
        scored.backward()
        losses.append(scored.item())
        for w, start, square in zip(weights, trained, squares, strict=True):
            gradients, flat = w.grad.flatten().tolist(), w.data.view(-1)
            for i, root in enumerate(math.sqrt(value) for value in square.flatten().tolist()):
                old = flat[i].item()
                pull = min(1.0, decay * root / mean)
                flat[i] = old - rate * gradients[i] / (root + EPSILON) + pull * (start[i] - old)
    return losses


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.002, 0.1]), st.sampled_from([0.0, 0.02, 0.9, 5.0]))
@example(8, 0.1, 0.0)
def test_it_is_the_paper_s_loop(seed, rate, decay):
    """It ends in a sentence where the loop by hand diverges, as in the example."""
    model, other = model_of(seed), model_of(seed)
    training = torch.randint(0, 5, (4, 6))
    text = torch.randint(0, 5, (6, 5))
    expected = by_hand(other, training, text, rate, decay)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dynamic = DynamicEvaluation(model.parameters(), rate, decay, EPSILON)
    dynamic.measure(loss(model, words) for words in training)
    losses, diverges = [], max(expected) >= DIVERGED
    with pytest.raises(RKMError, match="has diverged") if diverges else nullcontext():
        for words in text:
            losses.append(loss(model, words))
            dynamic.learn(losses[-1])
            dynamic.check()
    torch.testing.assert_close(torch.stack(losses).tolist(), expected[: len(losses)], rtol=1e-5, atol=1e-6)
    assert diverges or len(losses) == len(expected)
    for name, value in () if diverges else other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    dynamic.forget()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


class Names(TorchDispatchMode):
    """Takes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("transposed", [False, True])
def test_all_weights_take_few_operators(transposed):
    """One for each kind of layout. No number comes to the host."""
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.rand(3, 4)) for _ in range(6)]
    others = [torch.rand(4, 3).t() if transposed and i % 3 == 0 else torch.rand(3, 4) for i in range(6)]
    dynamic = DynamicEvaluation(weights, 0.1, 0.0, 1.0)

    def loss():
        """Its gradients are laid out as ``others`` are."""
        return Given.apply(others, *weights)

    dynamic.measure(loss() for _ in range(2))
    before = [weight.detach().clone() for weight in weights]
    given = loss()
    with Names() as seen:
        dynamic.learn(given)
    assert [name for name in seen.names if "addc" in name] == ["_foreach_addcmul_"] * (1 + transposed)
    assert [name for name in seen.names if "lerp" in name] == ["_foreach_lerp_"]
    assert "_local_scalar_dense" not in seen.names
    for weight, was, other in zip(weights, before, others, strict=True):
        torch.testing.assert_close(weight.detach(), was - 0.1 * other / (other + 1))


class Given(torch.autograd.Function):
    """A loss with given gradients."""

    @staticmethod
    def forward(ctx, gradients, *weights):
        ctx.gradients = gradients
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.gradients


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_values_outside_their_range_are_refused(value):
    with pytest.raises(RKMError, match="--dynamic-lr must be 0 or more"):
        DynamicEvaluation([], value, 0.0, EPSILON)
    with pytest.raises(RKMError, match="--dynamic-decay must be 0 or more"):
        DynamicEvaluation([], 0.0, value, EPSILON)
    with pytest.raises(RKMError, match="--dynamic-epsilon must be above 0"):
        DynamicEvaluation([], 0.0, 0.0, 0.0 if value == -0.1 else value)


def test_weights_in_16_bits_are_refused():
    with pytest.raises(RKMError, match="leave out --fp16"):
        DynamicEvaluation(model_of(1).half().parameters(), 0.1, 0.1, EPSILON)


def test_training_text_without_gradients_and_diverged_learning_are_told():
    model = model_of(1)
    dynamic = DynamicEvaluation(model.parameters(), 0.1, 0.1, EPSILON)
    with pytest.raises(RKMError, match="no finite gradient on the training text"):
        dynamic.measure(0 * loss(model, words) for words in torch.zeros(2, 5, dtype=torch.long))
    dynamic.measure(loss(model, words) for words in torch.arange(10).remainder(5).view(2, 5))
    for factor in (1000, math.inf, math.nan):
        for times in (1, factor, 1):
            dynamic.learn(loss(model, torch.zeros(2, dtype=torch.long)).detach().requires_grad_() * times)
        for _ in range(2):
            with pytest.raises(RKMError, match="has diverged: lower --dynamic-lr"):
                dynamic.check()
        dynamic.forget()
        dynamic.check()
