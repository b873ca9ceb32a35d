import numpy as np
import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm.models.translation.hypotheses import Choices, follow_back

EOS = 2


def choices(tokens, scores, parents, ended, ended_scores, ended_parents, attention):
    """Of one sentence."""
    return Choices(
        *(torch.tensor([values]) for values in (tokens, scores, parents, ended, ended_scores, ended_parents, attention))
    )


# Two beams. The first hypothesis ends second at step 1, from the beam that had said 6; the second at step 2, from the
# beam that had said 5, 8. What ends at step 3 is too late.
SEARCH = [
    choices([5, 6], [-1.0, -2.0], [0, 0], [False, False], [-1.0, -2.0], [0, 0], [[0.1, 0.9], [0.2, 0.8]]),
    choices([7, 8], [-3.0, -3.5], [1, 0], [False, True], [-3.0, -2.5], [1, 1], [[0.3, 0.7], [0.4, 0.6]]),
    choices([9, 9], [-4.0, -5.0], [0, 1], [True, False], [-3.75, -4.0], [1, 0], [[0.5, 0.5], [0.6, 0.4]]),
    choices([9, 9], [-6.0, -7.0], [0, 1], [True, True], [-4.1, -4.2], [0, 1], [[0.7, 0.3], [0.8, 0.2]]),
]


def test_hypotheses_are_followed_back_over_the_beams_that_they_had():
    (best, other), = follow_back(SEARCH, EOS)  # fmt: skip
    assert best["tokens"].tolist() == [6, EOS]
    assert other["tokens"].tolist() == [5, 8, EOS]
    assert best["score"].item() == -2.5 / 2
    assert other["score"].item() == -3.75 / 3
    assert best["positional_scores"].tolist() == [-2.0, -0.5]
    assert other["positional_scores"].tolist() == [-1.0, -2.5, -0.25]
    assert_close(best["attention"], torch.tensor([[0.1, 0.4], [0.9, 0.6]]))
    assert_close(other["attention"], torch.tensor([[0.1, 0.3, 0.6], [0.9, 0.7, 0.4]]))
    assert best["alignment"].numel() == 0


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({"normalize": False}, [-2.5, -3.75]),
        ({"length_penalty": 2.0}, [-3.75 / 9, -2.5 / 4]),
        ({"length_penalty": 0.0}, [-2.5, -3.75]),
    ],
)
def test_the_best_comes_first_by_the_score_that_is_asked_for(options, scores):
    found = follow_back(SEARCH, EOS, **options)[0]
    assert_close(torch.stack([hypothesis["score"] for hypothesis in found]), torch.tensor(scores))


def test_a_sentence_without_an_end_has_no_hypotheses_and_ties_keep_their_order():
    def two(values, other):
        return torch.cat([values, other])

    never = choices([9, 9], [-1.0, -1.0], [0, 1], [False, False], [-1.0, -1.0], [0, 1], [[0.5, 0.5], [0.5, 0.5]])
    tied = choices([9, 9], [-1.0, -1.0], [0, 1], [True, True], [-1.0, -1.0], [1, 0], [[0.1, 0.9], [0.2, 0.8]])
    found = follow_back([Choices(*map(two, never, tied))], EOS)
    assert found[0] == []
    assert [hypothesis["attention"].flatten().tolist()[0] for hypothesis in found[1]] == [
        pytest.approx(0.2),
        pytest.approx(0.1),
    ]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_search_is_followed_back_as_one_hypothesis_after_another(steps, sentences, beams, seed):
    draw = np.random.default_rng(seed)
    shape = sentences, beams
    search = [
        Choices(
            torch.from_numpy(draw.integers(3, 90, shape)),
            torch.from_numpy(draw.normal(size=shape).astype("float32")),
            torch.from_numpy(draw.integers(0, beams, shape)),
            torch.from_numpy(draw.random(shape) < 0.4),
            torch.from_numpy(draw.normal(size=shape).astype("float32")),
            torch.from_numpy(draw.integers(0, beams, shape)),
            torch.from_numpy(draw.random((*shape, 5)).astype("float32")),
        )
        for _ in range(steps)
    ]
    found = follow_back(search, EOS)
    for sentence in range(sentences):
        wanted = list(one_by_one(search, sentence, beams))
        wanted.sort(key=lambda hypothesis: -hypothesis[0])
        assert len(found[sentence]) == len(wanted)
        for given_, (score, tokens, sums, attention) in zip(found[sentence], wanted, strict=True):
            assert given_["score"].item() == pytest.approx(score)
            assert given_["tokens"].tolist() == tokens
            assert_close(given_["positional_scores"].cumsum(0), torch.tensor(sums))
            assert torch.equal(given_["attention"], torch.stack(attention, dim=1))


def one_by_one(search, sentence, beams):
    """The first hypotheses to end: score, tokens, log-probability up to each, and attention."""
    ends = [(t, rank) for t, step in enumerate(search) for rank in range(beams) if step.ended[sentence, rank]]
    for last, rank in ends[:beams]:
        total = search[last].ended_scores[sentence, rank].item()
        beam = search[last].ended_parents[sentence, rank].item()
        tokens, sums, attention = [EOS], [total], [search[last].attention[sentence, beam]]
        for step in reversed(search[:last]):
            tokens.insert(0, step.tokens[sentence, beam].item())
            sums.insert(0, step.scores[sentence, beam].item())
            beam = step.parents[sentence, beam].item()
            attention.insert(0, step.attention[sentence, beam])
        yield total / (last + 1), tokens, sums, attention
