"""Tokens are read where they lie; no token that is not in the dictionary gets any further, however large the file."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data import indexed_check, tokens
from fairseq_rkm.data.binarized_split import open_tokens
from fairseq_rkm.data.indexed_check import check_layout, read_index, spread
from fairseq_rkm.data.tokens import HeldTokens, JoinedTokens

KINDS = [("mmap", 8), ("mmap", 70_000), ("mmap", None), ("cached", None)]
"""fairseq's formats of numbers, with the size of dictionary that decides their type: uint16, uint32, uint32, int32."""


def words(count: int = 4) -> Dictionary:
    made = Dictionary()
    for i in range(count):
        made.add_symbol(f"w{i}")
    return made


def write(prefix, kind, sentences) -> list[int]:
    builder = make_builder(f"{prefix}.bin", kind[0], vocab_size=kind[1])
    for sentence in sentences:
        builder.add_item(torch.tensor(sentence))
    builder.finalize(f"{prefix}.idx")
    return [token for sentence in sentences for token in sentence]


@settings(deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    sentences=st.lists(st.lists(st.integers(4, 7), max_size=4).map(lambda s: [*s, 2]), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_stretch_of_any_parts_is_the_text_s(tmp_path_factory, kinds, sentences, data):
    folder = tmp_path_factory.mktemp("data")
    parts = [write(folder / f"train{k or ''}", kind, sentences[k:] or [[2]]) for k, kind in enumerate(kinds)]
    wanted = [token for part in parts for token in part]
    opened = open_tokens(str(folder / "train"), words(), combine=True)
    first = data.draw(st.integers(0, len(wanted)))
    stop = data.draw(st.integers(first, len(wanted)))
    for given_tokens in (opened, copy.deepcopy(opened)):
        assert len(given_tokens) == len(wanted)
        read = given_tokens.read(first, stop)
        assert read.dtype == np.int64
        assert read.tolist() == wanted[first:stop]


def test_texts_in_memory_follow_each_other():
    joined = JoinedTokens([HeldTokens(np.arange(3, dtype=np.int32)), HeldTokens(torch.arange(3, 5))])
    assert len(joined) == 5
    assert [joined.read(*at).tolist() for at in [(0, 5), (2, 4), (3, 5), (1, 1)]] == [
        [0, 1, 2, 3, 4],
        [2, 3],
        [3, 4],
        [],
    ]


@given(total=st.integers(0, 100_000), most=st.none() | st.integers(256, 100_000))
def test_a_spread_holds_all_or_the_ends_and_no_more_than_asked_for(total, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed_check, "CHUNK", 1000)
        found = list(spread(total, most))
    assert all(first < stop for first, stop in found)
    assert all(before[1] <= after[0] for before, after in pairwise(found))
    seen = set().union(*(range(*stretch) for stretch in found)) if found else set()
    if most is None or total <= most:
        assert seen == set(range(total))
    else:
        assert sum(stop - first for first, stop in found) <= most
        assert {0, total - 1} <= seen <= set(range(total))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_beyond_the_dictionary_is_named_when_it_is_read_if_the_file_is_large(tmp_path, monkeypatch, kind):
    sentences = [[4, 5, 6, 2]] * 500 + [[7, 8, 2]] + [[4, 5, 6, 2]] * 500
    write(tmp_path / "train", kind, sentences)
    message = r"train.bin, sentence 501: token 2 is number 8, and the dictionary has 0 to 7"
    with pytest.raises(RKMError, match=message):
        open_tokens(str(tmp_path / "train"), words())
    monkeypatch.setattr(tokens, "SAMPLE", 1000)
    opened = open_tokens(str(tmp_path / "train"), words())
    assert opened.read(1998, 2001).tolist() == [6, 2, 7]
    with pytest.raises(RKMError, match=message):
        opened.read(1998, 2002)
    assert opened.read(2002, 2004).tolist() == [2, 4]


def test_the_ends_and_a_spread_of_a_large_file_are_looked_at_when_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "SAMPLE", 256)
    for at in (0, 4_000, 9_999):
        text = [4] * 10_000
        text[at : at + 40] = [9] * len(text[at : at + 40])
        write(tmp_path / "train", KINDS[0], [text])
        with pytest.raises(RKMError, match=r"token [\d,]+ is number 9"):
            open_tokens(str(tmp_path / "train"), words())


def test_a_file_that_was_cut_while_it_was_open(tmp_path):
    write(tmp_path / "train", KINDS[0], [[4, 5, 6, 2]] * 10)
    opened = open_tokens(str(tmp_path / "train"), words())
    assert opened.read(0, 2).tolist() == [4, 5]
    with open(tmp_path / "train.bin", "r+b") as file:
        file.truncate(21)
    assert opened.read(8, 10).tolist() == [4, 5]
    with pytest.raises(RKMError, match=r"train.bin is shorter than when it was opened"):
        opened.read(8, 12)


def test_an_index_whose_sentences_are_many_is_looked_at_in_part(tmp_path, monkeypatch):
    """In whole for all other tasks."""
    monkeypatch.setattr(indexed_check, "CHUNK", 100)
    write(tmp_path / "train", KINDS[0], [[4, 2]] * 1000)
    data, path = tmp_path / "train.bin", tmp_path / "train.idx"
    check_layout(read_index(path), data, path)
    sound = path.read_bytes()
    for sentence in (1, 2, 100, 101, 102, 500, 1000):
        damaged = bytearray(sound)
        damaged[26 + 4000 + 8 * (sentence - 1)] ^= 1  # the sentence's place
        path.write_bytes(damaged)
        with pytest.raises(RKMError, match=f"sentence {sentence:,} is not where the one before ends"):
            check_layout(read_index(path), data, path)
        if sentence in (1, 1000):
            with pytest.raises(RKMError, match=rf"sentence {sentence:,} is not where|it is cut off"):
                check_layout(read_index(path), data, path, most=256)
    data.write_bytes(data.read_bytes()[:-2])
    path.write_bytes(sound)
    with pytest.raises(RKMError, match=r"has 3,998 bytes, and by train.idx 4,000: it is cut off"):
        check_layout(read_index(path), data, path, most=256)
