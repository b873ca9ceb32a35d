"""A mixture of softmaxes against sums over its parts, one position at a time."""

import math

import pytest
import torch
from helpers import assert_close
from torch.nn import functional as F

from fairseq_rkm import RKMError
from fairseq_rkm.modules.softmax_mixture import SoftmaxMixture


def build(number, features=6, size=4, types=9, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    mixture = SoftmaxMixture(features, size, number, dropout).to(dtype)
    words = torch.nn.Linear(size, types).to(dtype)
    for parameter in (*mixture.parameters(), *words.parameters()):
        torch.nn.init.normal_(parameter)
    return mixture, words


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_each_probability_is_the_sum_by_hand(number):
    mixture, words = build(number)
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    probabilities = mixture(h, words).exp()
    assert probabilities.shape == (2, 3, 9)
    for b, t in ((0, 0), (1, 2)):
        shares = softmax((mixture.prior.weight @ h[b, t]).tolist())
        vectors = torch.tanh(mixture.latent.weight @ h[b, t] + mixture.latent.bias).split(4)
        parts = [softmax((words.weight @ vector + words.bias).tolist()) for vector in vectors]
        for word in range(9):
            wanted = sum(share * part[word] for share, part in zip(shares, parts, strict=True))
            assert probabilities[b, t, word].item() == pytest.approx(wanted, rel=1e-12)


def test_gradients():
    mixture, words = build(3)
    h = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, *_: mixture(h, words), (h, *mixture.parameters(), *words.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_of_float32_and_a_softmax_leaves_them(dtype):
    mixture, words = build(4, dtype=dtype)
    logs = mixture(torch.randn(2, 3, 6, dtype=dtype), words)
    assert logs.dtype == torch.float32
    assert logs.logsumexp(-1).abs().max() < 1e-5
    assert_close(F.log_softmax(logs, -1), logs)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_certain_and_even_parts_give_no_missing_number(scale):
    mixture, words = build(3, dtype=torch.float32)
    with torch.no_grad():
        words.weight.mul_(scale)
        mixture.prior.weight.mul_(scale)
    h = torch.randn(2, 3, 6, requires_grad=True)
    logs = mixture(h, words)
    assert logs.isfinite().all()
    (-logs[..., 0].sum()).backward()
    assert h.grad.isfinite().all()


def test_one_mask_for_all_steps_drops_numbers_that_the_softmaxes_read():
    mixture, words = build(2, dropout=0.5)
    seen = []
    words.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    h = torch.randn(3, 5, 6, dtype=torch.float64)
    mixture.train()(h, words)
    mixture.eval()(h, words)
    zeros, whole = seen[0] == 0, seen[1]
    assert (zeros == zeros[:, :1]).all()
    assert 0 < zeros.double().mean() < 1
    assert_close(seen[0], torch.where(zeros, 0, 2 * whole))
    with pytest.raises(RKMError, match=r"--dropout-latent must lie within \[0, 1\), not be 1"):
        SoftmaxMixture(6, 4, 2, 1)
