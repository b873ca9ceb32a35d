"""Words and their scores do not depend on where a text is cut; they are those of the whole text, counted naively."""

import math
import random

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.word_scores import Sample, WordScores

SYMBOLS = {"@@ ": ["a@@", "b@@", "a", "b", "c"], "sentencepiece": ["\u2581a", "\u2581b", "a", "b", "\u2581"]}
SYMBOLS["subword_nmt"] = SYMBOLS["@@ "]


def dictionary(kind):
    made = Dictionary()
    for symbol in SYMBOLS[kind]:
        made.add_symbol(symbol)
    return made


def naive_count(tokens, words, kind):
    """The words of each line as fairseq's own post-processing has them, and the ends of the lines."""
    count, line = 0, []
    for token in tokens:
        if token == words.eos():
            count += len(post_process(" ".join(line), kind).split()) + 1
            line = []
        else:
            line.append(words[token])
    return count


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(SYMBOLS)),
    lines=st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=6),
    length=st.integers(1, 20),
    streams=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_words_are_those_of_the_whole_text(kind, lines, length, streams, seed):
    words = dictionary(kind)
    # A line's first sentencepiece begins a word.
    first = {"sentencepiece": [4]}.get(kind, [])
    tokens = [token for line in lines for token in ([*first, *(4 + i for i in line)] if line else []) + [words.eos()]]
    tokens = torch.tensor(tokens)
    scores = torch.rand(len(tokens)) - 2
    parts = list(zip(tokens.tensor_split(streams), scores.tensor_split(streams), strict=True))
    samples = [
        [Sample(i, *pair) for pair in zip(part.split(length), its.split(length), strict=True)]
        for i, (part, its) in enumerate(parts)
    ]
    found = WordScores(words, kind)
    draw = random.Random(seed)
    while any(samples):  # in the order of each stream, but between them any
        found.add(draw.choice([stream for stream in samples if stream]).pop(0))
    found.sort()
    assert torch.equal(found.tokens(), tokens)
    given_words = found.words()
    assert len(given_words) == naive_count(tokens.tolist(), words, kind) == int(found.number(tokens)[-1]) + 1
    assert math.isclose(sum(word.score for word in given_words), float(scores.double().sum()), rel_tol=1e-9)
    assert sum(word.pieces for word in given_words) == len(tokens)
    assert [word.sample for word in given_words] == sorted(word.sample for word in given_words)


def test_the_words_themselves_and_where_they_end():
    words = dictionary("@@ ")
    found = WordScores(words, "@@ ")
    index = [words.index(symbol) for symbol in ("a@@", "b@@", "c", "a", "</s>")]
    found.add(Sample(0, torch.tensor(index[:2]), torch.tensor([-1.0, -2.0])))
    found.add(Sample(1, torch.tensor(index[2:]), torch.tensor([-4.0, -8.0, -16.0])))
    assert found.words() == [("abc", -7.0, 3, 1), ("a", -8.0, 1, 1), ("</s>", -16.0, 1, 1)]


def test_parts_of_a_text_are_refused_unless_they_are_sentences():
    words = dictionary("@@ ")
    sentence, cut = torch.tensor([4, 6, words.eos()]), torch.tensor([6, 4])
    for ids, tokens in (((0, 2), cut), ((1, 2), cut), ((0, 1), cut)):
        found = WordScores(words, "@@ ")
        for number in ids:
            found.add(Sample(number, tokens, torch.zeros(len(tokens))))
        with pytest.raises(RKMError, match=r"words go on in samples that are not here\. Evaluate the whole text"):
            found.sort()
    found = WordScores(words, "@@ ")
    for number in (5, 1):
        found.add(Sample(number, sentence, torch.zeros(3)))
    found.sort()
    assert [word.text for word in found.words()] == ["aa", "</s>"] * 2


def test_another_post_processing_is_refused():
    with pytest.raises(RKMError, match=r"--post-process 'letter': there is perplexity of words for 'sentencep"):
        WordScores(dictionary("@@ "), "letter")
