import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data import token_stream
from fairseq_rkm.data.token_stream import SegmentIterator, SingleBatches, StreamSegments, TokenStream, random_lengths

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


@given(
    st.integers(1, 200), st.integers(1, 5), st.integers(1, 3), st.integers(1, 30),
    st.none() | st.tuples(st.integers(0, 9), st.integers(1, 9)), st.integers(1, 100), st.randoms(),
)  # fmt: skip
def test_items_do_not_depend_on_how_much_is_read_at_a_time(count, per_rank, ranks, length, seed, block, order):
    """They are the columns of a table of all of the text, in any order."""
    streams = per_rank * ranks
    count = max(count, streams)
    tokens = torch.arange(10, 10 + count)
    sizes = [len(part) for part in np.array_split(np.arange(count), streams)]
    before = torch.cat([torch.tensor([EOS]), tokens[:-1]])
    source, target = (
        torch.nn.utils.rnn.pad_sequence(t.split(sizes), batch_first=True, padding_value=PAD) for t in (before, tokens)
    )
    lengths = [length] * (max(sizes) // length + 1) if seed is None else random_lengths(max(sizes), length, seed)
    ends = np.minimum(np.cumsum(lengths), max(sizes))
    rank = order.randrange(ranks)
    rows = slice(rank * per_rank, (rank + 1) * per_rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_stream, "BLOCK", block)
        items = segments(tokens.tolist(), streams, length, (rows.start, rows.stop), seed)
        numbers = list(range(len(items)))
        order.shuffle(numbers)
        for number in numbers:
            item, first = items[number], int(ends[number - 1]) if number else 0
            columns = slice(first, int(ends[number]))
            assert torch.equal(item["net_input"]["src_tokens"], source[rows, columns])
            assert torch.equal(item["target"], target[rows, columns])
            assert item["net_input"]["segment"] == number
        assert int(ends[len(items) - 1]) == max(sizes)
        assert items[-1]["net_input"]["segment"] == len(items) - 1
    with pytest.raises(IndexError):
        items[len(items)]


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


def iterator(tokens: int = 100, streams: int = 4, length: int = 5, seed: tuple[int, int] | None = None, shift: int = 0):
    stream = TokenStream(torch.arange(tokens) + shift, 2, "train")
    segments = StreamSegments(stream, streams, (0, streams), length, 1, length_seed=seed)
    return SegmentIterator(segments)


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({}, {"length": 6}, "--tokens-per-sample: 5, now 6"),
        ({}, {"streams": 5}, "--batch-size times processes: 4, now 5"),
        ({}, {"tokens": 101}, "the training text"),
        ({}, {"shift": 1}, "the training text"),
        ({}, {"seed": (1, 1)}, "--variable-bptt: False, now True"),
        ({"seed": (1, 1)}, {"seed": (2, 1)}, "--seed, by which --variable-bptt draws lengths: 1, now 2"),
    ],
)
def test_a_text_that_is_cut_otherwise_is_not_gone_on_with(then, now, named):
    before = iterator(**then)
    batches = before.next_epoch_itr(shuffle=False)
    next(batches)
    state = before.state_dict()
    with pytest.raises(RKMError, match=named) as raised:
        iterator(**{**then, **now}).load_state_dict(state)
    assert "--reset-dataloader" in str(raised.value)
    list(batches)
    ended = before.state_dict()
    assert ended["iterations_in_epoch"] == 0
    iterator(**{**then, **now}).load_state_dict(ended)  # an epoch's start is the same place in any cut


def test_checkpoints_of_before_know_their_text():
    """The checksum of a text that was read whole stays; a large text is known by the old one, too."""
    small = TokenStream(torch.arange(2_500_000) % 1000, EOS, "train")
    assert small.fingerprint() == "2500000 tokens, checksum 2d7358a2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_stream, "READ_WHOLE", 1000)
        assert "checksum of stretches" in small.fingerprint()
        assert small.has_fingerprint(small.fingerprint())
        assert small.has_fingerprint("2500000 tokens, checksum 2d7358a2")
        assert not small.has_fingerprint("2500000 tokens, checksum 2d7358a3")
        assert not small.has_fingerprint("2500000 tokens, checksum of stretches 2d7358a2")
        other = TokenStream((torch.arange(2_500_000) + 1) % 1000, EOS, "train")
        assert other.fingerprint() != small.fingerprint()
        old = iterator(tokens=2000)
        batches = old.next_epoch_itr(shuffle=False)
        next(batches)
        state = old.state_dict()
        state["cut"]["text"] = old.dataset.stream.spread_fingerprint()
        iterator(tokens=2000).load_state_dict(state)
        with pytest.raises(RKMError, match="the training text"):
            iterator(tokens=2000, shift=1).load_state_dict(state)


def test_batches_of_one_segment_each_are_listed_without_a_list():
    batches = SingleBatches(range(5))
    assert list(batches) == [[0], [1], [2], [3], [4]]
    assert list(batches[2:]) == [[2], [3], [4]]
    assert (len(batches), len(batches[2:]), batches[-1]) == (5, 3, [4])


def test_the_same_cut_goes_on_with_the_next_segment():
    before = iterator(seed=(1, 1))
    batches = before.next_epoch_itr(shuffle=False)
    next(batches)
    resumed = iterator(seed=(1, 1))
    resumed.load_state_dict(before.state_dict())
    assert torch.equal(next(resumed.next_epoch_itr())["target"], next(batches)["target"])
    old = {key: value for key, value in before.state_dict().items() if key != "cut"}
    iterator(seed=(1, 1)).load_state_dict(old)  # as checkpoints were before
    with pytest.raises(RKMError, match="stopped after 99 segments of an epoch that has"):
        iterator().load_state_dict({**old, "iterations_in_epoch": 99})
