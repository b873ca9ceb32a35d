"""Logits with further columns for aligned rows."""

import pytest
import torch
from helpers import DEVICES, assert_close
from torch import nn

from fairseq_rkm.modules.word_logits import padded_logits, word_logits


def passes(words, features, logits):
    """The logits of the words, and all gradients of a sum that weighs each differently."""
    cut = logits[..., : words.out_features]
    weights = torch.linspace(-1, 1, cut.numel(), dtype=cut.dtype, device=cut.device).view_as(cut)
    return cut.detach(), *torch.autograd.grad((cut * weights).sum(), (features, *words.parameters()))


@pytest.mark.parametrize("bias", [False, True])
def test_further_columns_are_impossible_and_the_others_as_they_were(bias):
    words, features = nn.Linear(5, 7, bias, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    features.requires_grad_()
    logits = padded_logits(words, features, 9)
    assert logits.shape == (2, 3, 16)
    assert logits[..., 7:].eq(-torch.inf).all()
    for given, wanted in zip(passes(words, features, logits), passes(words, features, words(features)), strict=True):
        assert_close(given, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [7, 16, 33])
def test_rows_are_aligned_on_a_gpu_alone(device, number):
    words, features = nn.Linear(8, number, device=device), torch.randn(4, 8, device=device, requires_grad=True)
    logits = word_logits(words, features)
    assert logits.size(1) == (-(-number // 16) * 16 if device == "cuda" else number)
    for given, wanted in zip(passes(words, features, logits), passes(words, features, words(features)), strict=True):
        assert_close(given, wanted, dtype="tf32")


class Scaled(nn.Linear):
    def forward(self, features):
        return 2 * super().forward(features)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_that_does_more_than_a_product_does_it(device):
    features = torch.randn(4, 8, device=device)
    scaled, hooked = Scaled(8, 7, device=device), nn.Linear(8, 7, device=device)
    hooked.register_forward_hook(lambda _module, _given, output: 3 * output)
    for words in (scaled, hooked):
        assert torch.equal(word_logits(words, features), words(features))
