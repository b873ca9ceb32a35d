import math
from itertools import pairwise

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.modules.continuous_cache import ContinuousCache

V = 7


def by_hand(logits, outputs, tokens, size, theta, weight):
    """The paper's formula, a position and a word at a time."""
    result = torch.empty(logits.shape, dtype=torch.float64)
    for b in range(logits.size(0)):
        for t in range(logits.size(1)):
            model = logits[b, t].double().softmax(0)
            cache = [0.0] * V
            for i in range(max(0, t - size), t):
                cache[tokens[b, i + 1]] += math.exp(theta * float(outputs[b, t].double() @ outputs[b, i].double()))
            total = sum(cache)
            for w in range(V):
                share = cache[w] / total if total else 0
                result[b, t, w] = math.log((1 - weight) * model[w] + weight * share if total else model[w])
    return result


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(1, 9), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 99))
def test_the_mixture_is_the_formula_however_the_stream_is_cut(steps, size, cuts, seed):
    torch.manual_seed(seed)
    logits, outputs, tokens = torch.randn(2, steps, V), torch.randn(2, steps, 3), torch.randint(0, V, (2, steps))
    cache, memory, parts = ContinuousCache(size, 0.7, 0.3), None, []
    edges = sorted({0, steps, *(cut for cut in cuts if cut < steps)})
    for begin, end in pairwise(edges):
        piece = slice(begin, end)
        part, memory = cache.log_probabilities(logits[:, piece], outputs[:, piece], tokens[:, piece], memory)
        assert memory.keys.size(1) == memory.words.size(1) + 1 == min(size, end)
        parts.append(part)
    mixed = torch.cat(parts, 1)
    assert_close(mixed, by_hand(logits, outputs, tokens, size, 0.7, 0.3), dtype=torch.float32)
    assert_close(mixed.exp().sum(-1), torch.ones(2, steps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1.0, 0.1), "--cache-size must be 0"),
        ((10, -1.0, 0.1), "--cache-theta must be 0 or more"),
        ((10, math.nan, 0.1), "--cache-theta must be 0 or more"),
        ((10, 1.0, 1.1), "--cache-lambda must lie within"),
        ((10, 1.0, 1.0), "words outside the cache need the model"),
    ],
)
def test_values_outside_their_range_are_refused(arguments, message):
    with pytest.raises(RKMError, match=message):
        ContinuousCache(*arguments)


def test_no_word_is_impossible():
    logits = torch.tensor([[[0.0, -200.0, 0.0]] * 3])
    scores, _ = ContinuousCache(10, 1.0, 0.5).log_probabilities(
        logits, torch.ones(1, 3, 2), torch.tensor([[0, 0, 2]]), None
    )
    assert scores.isfinite().all()
