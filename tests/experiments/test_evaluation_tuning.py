import argparse
import itertools
import math
import sys

import pytest
import torch

from fairseq_rkm.experiments import cache_tuning, temperature_tuning
from fairseq_rkm.experiments.evaluation_tuning import perplexities
from fairseq_rkm.modules.continuous_cache import ContinuousCache

CPU = torch.device("cpu")


@pytest.fixture
def stream():
    """A stream in segments of several lengths, and a stand-in for a decoder that has drawn its answers before."""
    lengths, words = (7, 7, 3), 11
    text = torch.randint(0, words, (1, sum(lengths) + 1))
    logits, outputs = torch.randn(1, sum(lengths), words), torch.randn(1, sum(lengths), 4)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    places = [slice(*pair) for pair in itertools.pairwise(bounds)]
    segments = [
        {"net_input": {"src_tokens": text[:, :-1][:, place]}, "target": text[:, 1:][:, place]} for place in places
    ]

    def decoder(tokens, segment):
        assert torch.equal(tokens, segments[segment]["net_input"]["src_tokens"])
        return logits[:, places[segment]], {"features": outputs[:, places[segment]].transpose(0, 1)}

    return decoder, segments, text, logits, outputs


def wanted(stream, temperature=1.0, cache=None):
    """The perplexity of the stream as a whole."""
    _, _, text, logits, outputs = stream
    logs = (logits / temperature).log_softmax(-1)
    if cache is not None:
        logs, _ = ContinuousCache(*cache).log_probabilities(logits / temperature, outputs, text[:, :-1], None)
    return math.exp(-logs.gather(2, text[:, 1:].unsqueeze(-1)).double().mean())


def test_each_pair_of_a_cache_scores_as_it_does_alone(stream):
    found = perplexities(cache_tuning.CacheTuning(argparse.Namespace(size=5)), *stream[:2], CPU)
    assert len(found) == 64
    for (theta, weight), value in found.items():
        assert value == pytest.approx(wanted(stream, cache=(5, theta, weight)), rel=1e-5)


@pytest.mark.parametrize("cache", [None, (5, 0.3, 0.2)])
def test_each_temperature_scores_as_it_does_alone_and_beside_a_cache(stream, cache):
    numbers = dict(zip(("cache_size", "cache_theta", "cache_lambda"), cache or (0, 1.0, 0.1), strict=True))
    tuning = temperature_tuning.TemperatureTuning(argparse.Namespace(**numbers))
    found = perplexities(tuning, *stream[:2], CPU)
    assert len(found) == 14
    for (value,), perplexity in found.items():
        assert perplexity == pytest.approx(wanted(stream, value, cache), rel=1e-5)


@pytest.mark.parametrize(
    ("module", "flags", "program"),
    [(cache_tuning, ["--size", "0"], "tune_cache"), (temperature_tuning, ["--cache-size", "-1"], "tune_temperature")],
)
def test_a_mistake_is_told_in_a_sentence_that_names_the_script(monkeypatch, module, flags, program):
    monkeypatch.setattr(sys, "argv", [program, "data", "last.pt", *flags])
    with pytest.raises(SystemExit, match=f"^{program}: --cache-size must be"):
        module.main()
