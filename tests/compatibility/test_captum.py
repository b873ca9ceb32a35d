"""``captum``: what it attributes to inputs adds up, whichever backend computes the gradients."""

import copy

import pytest
import torch
from helpers import assert_close, randomized
from torch import nn

from fairseq_rkm import RKM

attr = pytest.importorskip("captum.attr", reason="needs captum; see CONTRIBUTING, compatibility")

MODELS = [
    {"cell": "lstm"},
    {"cell": "rkm_lstm", "num_layers": 2, "bidirectional": True, "ngram": 3},
    {"cell": "linear_kernel", "learn_sigma": True, "layer_norm": True},
]
each_model = pytest.mark.parametrize("arguments", MODELS, ids=lambda a: a["cell"])


class Classifier(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.out = rnn, nn.LazyLinear(2)

    def forward(self, x, padding_mask=None):
        output, _ = self.rnn(x, padding_mask=padding_mask)
        return self.out(output.sum(1))


def classifiers(**arguments):
    """The same classifier by ``"auto"`` and by the reference."""
    model = Classifier(randomized(RKM(3, 4, batch_first=True, **arguments)))
    model(torch.zeros(1, 1, 3))
    exact = copy.deepcopy(model)
    exact.rnn.backend = "reference"
    return model.eval(), exact.eval()


def batch():
    x, mask = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return x, mask


@each_model
def test_integrated_gradients_sum_to_the_difference(arguments):
    model, exact = classifiers(**arguments)
    x, mask = batch()
    given, wanted = (
        attr.IntegratedGradients(m).attribute(x, target=1, additional_forward_args=(mask,), n_steps=64)
        for m in (model, exact)
    )
    assert_close(given, wanted, dtype="tf32")
    assert not given[mask].any(), "padding has no part in it"
    difference = model(x, mask)[:, 1] - model(torch.zeros_like(x), mask)[:, 1]
    assert_close(given.sum((1, 2)), difference.double(), dtype="tf32")


@each_model
def test_other_attributions_are_the_reference_s(arguments):
    x, _ = batch()
    results = [
        [
            attr.Saliency(model).attribute(x, target=0),
            attr.InputXGradient(model).attribute(x, target=0),
            attr.Occlusion(model).attribute(x, (1, 3), target=0),
            attr.FeatureAblation(model).attribute(x, target=0),
            attr.LayerGradientXActivation(model, model.out).attribute(x, target=0),
        ]
        for model in classifiers(**arguments)
    ]
    for given, wanted in zip(*results, strict=True):
        assert_close(given, wanted)
