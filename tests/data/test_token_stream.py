import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.token_stream import StreamSegments, TokenStream, random_lengths

PAD, EOS = 1, 2


def segments(tokens, streams, length, rows=None, seed=None):
    stream = TokenStream(torch.tensor(tokens), EOS, "train")
    return StreamSegments(stream, streams, rows or (0, streams), length, PAD, seed)


def test_a_small_corpus_by_hand():
    items = list(map(segments([10, 11, 12, 13, 14, 15, 16], 2, 3).__getitem__, range(2)))
    assert items[0]["net_input"]["src_tokens"].tolist() == [[EOS, 10, 11], [13, 14, 15]]
    assert items[0]["target"].tolist() == [[10, 11, 12], [14, 15, 16]]
    assert items[1]["net_input"]["src_tokens"].tolist() == [[12], [PAD]]
    assert items[1]["target"].tolist() == [[13], [PAD]]
    assert [item["ntokens"] for item in items] == [6, 1]
    assert [item["net_input"]["segment"] for item in items] == [0, 1]


@given(
    st.integers(1, 60), st.integers(1, 7), st.integers(1, 3), st.integers(1, 9),
    st.none() | st.tuples(st.integers(0, 9), st.integers(1, 9)),
)  # fmt: skip
def test_every_token_is_a_target_once_after_the_token_before_it(count, per_rank, ranks, length, seed):
    tokens = list(range(10, 10 + count))
    streams = per_rank * ranks
    if count < streams:
        with pytest.raises(RKMError, match=f"'train' has {count} tokens, fewer than the {streams} parallel streams"):
            segments(tokens, streams, length)
        return
    pairs = []
    sizes = set()
    for rank in range(ranks):
        items = segments(tokens, streams, length, (rank * per_rank, (rank + 1) * per_rank), seed)
        sizes.add(len(items))
        for i in range(len(items)):
            source, target = items[i]["net_input"]["src_tokens"], items[i]["target"]
            assert items[i]["ntokens"] == target.ne(PAD).sum()
            pairs += [(int(s), int(t)) for s, t in zip(source.flatten(), target.flatten(), strict=True) if t != PAD]
    assert len(sizes) == 1, "all ranks take the same number of steps"
    assert sorted(pairs) == list(zip([EOS, *tokens], tokens, strict=False))


@given(st.integers(6, 40), st.integers(1, 9))
def test_the_ranks_together_are_the_one_process(count, length):
    tokens = list(range(10, 10 + count))
    whole = segments(tokens, 6, length)
    parts = [segments(tokens, 6, length, (2 * rank, 2 * rank + 2)) for rank in range(3)]
    for i in range(len(whole)):
        assert torch.equal(torch.cat([part[i]["target"] for part in parts]), whole[i]["target"])
        assert torch.equal(torch.cat([part[i]["id"] for part in parts]), whole[i]["id"])


@given(st.integers(1, 3000), st.integers(1, 90), st.tuples(st.integers(0, 9), st.integers(1, 9)))
def test_random_lengths_fill_the_stream_and_depend_on_the_seed_alone(total, length, seed):
    lengths = random_lengths(total, length, seed)
    assert sum(lengths) == total
    assert min(lengths) >= min(5, total)
    assert lengths == random_lengths(total, length, seed)


def test_random_lengths_are_of_the_published_distribution():
    lengths = torch.tensor(random_lengths(700_000, 70, (1, 1)), dtype=torch.float64)
    assert lengths[:100].tolist() != random_lengths(700_000, 70, (1, 2))[:100]
    short = lengths < 52.5
    assert short.double().mean() == pytest.approx(0.05, abs=0.008)
    # int() takes half a token off on average.
    for group, mean in ((lengths[~short], 69.5), (lengths[short], 34.5)):
        assert group.mean() == pytest.approx(mean, abs=0.6)
        assert group.std() == pytest.approx(5, abs=0.4)
