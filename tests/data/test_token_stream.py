import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
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


def by_hand(tokens, streams, length, whole, shifts, overlap):
    """Each stream's ``(source, target)`` pairs in order, from lists of tokens alone."""
    before = dict(zip(tokens, [EOS, *tokens], strict=False))
    text = []
    for number in range(overlap):
        # This pass begins its segments ``number / overlap`` of a segment after the text's first token, and goes on
        # within a segment where the pass before it ended.
        begin = (len(text) + number * length // overlap) % length % len(tokens)
        text += tokens[begin:] + tokens[:begin]
    unit = length if whole else 1
    units = [text[i : i + unit] for i in range(0, len(text), unit)]
    rows = [[token for i in part for token in units[i]] for part in np.array_split(np.arange(len(units)), streams)]
    return [[(before[t], t) for t in row[shift:] + row[:shift]] for row, shift in zip(rows, shifts, strict=True)]


@given(
    st.integers(1, 80), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.booleans(),
    st.booleans(), st.integers(1, 50), st.tuples(st.integers(0, 9), st.integers(1, 9)),
)  # fmt: skip
def test_shuffled_and_overlapping_streams_by_hand(
    count, per_rank, ranks, length, overlap, shuffled, varied, block, seed
):
    tokens, streams = list(range(10, 10 + count)), per_rank * ranks
    whole = overlap > 1 and not varied
    enough = count >= streams and -(-count * overlap // (length if whole else 1)) >= streams
    assume(enough and math.gcd(overlap, streams) == 1 and overlap <= length)
    stream = TokenStream(torch.tensor(tokens), EOS, "train")
    order = {"length_seed": seed if varied else None, "shuffle_seed": seed if shuffled else None, "overlap": overlap}
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_stream, "BLOCK", block)
        for rank in range(ranks):
            rows = (rank * per_rank, (rank + 1) * per_rank)
            items = StreamSegments(stream, streams, rows, length, PAD, **order)
            parts = [items[i] for i in range(len(items))]
            source = torch.cat([part["net_input"]["src_tokens"] for part in parts], 1)
            target = torch.cat([part["target"] for part in parts], 1)
            pairs = torch.stack([source, target], 2).tolist()
            read += [[(s, t) for s, t in row if t != PAD] for row in pairs]
            assert sum(part["ntokens"] for part in parts) == target.ne(PAD).sum()
    shifts = items.order.shifts
    assert read == by_hand(tokens, streams, length, whole, shifts, overlap)
    targets = Counter(target for row in read for _, target in row)
    assert targets == dict.fromkeys(tokens, overlap), "every token is a target once a pass"
    assert shuffled or not any(shifts)
    assert all(shift % (length if whole else 1) == 0 for shift in shifts)


@pytest.mark.parametrize("shuffle", [None, (1, 1)])
@pytest.mark.parametrize(("streams", "overlap", "length"), [(4, 5, 10), (3, 7, 70), (7, 3, 9)])
def test_passes_end_segments_at_evenly_spread_places(streams, overlap, length, shuffle):
    """Each token but a few begins a segment in at most one pass."""
    count = 2003
    items = iterator(count, streams, length, shuffle=shuffle, overlap=overlap, shift=10).dataset
    places = Counter()
    for item in map(items.__getitem__, range(len(items))):
        places.update((item["target"][:, 0][item["target"][:, 0] != PAD] - 10).remainder(length).tolist())
    even = [number * length // overlap for number in range(overlap)]
    each = [places[place] for place in even]
    # A pass ends within a segment, and so does the last stream, which goes on from its start if it is rotated.
    assert places.total() == pytest.approx(overlap * count / length, abs=2)
    if shuffle is None:
        assert places.total() - sum(each) <= overlap - 1
        assert max(each) - min(each) <= 3
    else:
        assert sum(each) >= (1 - 1.03 / streams) * places.total()


def test_rotations_depend_on_seed_epoch_and_stream_and_on_nothing_else():
    shifts = [iterator(10_000, 8, shuffle=seed).dataset.order.shifts for seed in [(1, 1), (1, 1), (1, 2), (2, 1)]]
    assert shifts[0] == shifts[1]
    assert shifts[0] != shifts[2] != shifts[3] != shifts[0]
    assert len(set(shifts[0])) == 8
    assert iterator(10_000, 8, seed=(1, 1), shuffle=(1, 1)).dataset.order.shifts == shifts[0]
    varied = [iterator(10_000, 8, seed=(1, 1), shuffle=s).dataset.ends.tolist() for s in (None, (1, 1))]
    assert varied[0] == varied[1]
    drawn = [shift for e in range(500) for shift in iterator(400, 4, shuffle=(1, e)).dataset.order.shifts]
    assert sorted(set(drawn)) == list(range(100))
    assert np.mean(drawn) == pytest.approx(49.5, abs=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"streams": 80, "overlap": 4}, "share the factor 4, so that 4 streams would .*: use 79 or 81 streams"),
        ({"streams": 6, "overlap": 4}, "share the factor 2, .*: use 5 or 7 streams"),
        ({"streams": 7, "overlap": 7, "length": 70}, "share the factor 7, .*: use 6 or 8 streams"),
        ({"streams": 3, "overlap": 8, "length": 7}, "--tokens-per-sample 7: make --overlap at most 7"),
        (
            {"streams": 9, "overlap": 2, "length": 70, "tokens": 200},
            "are 6 segments of 70 tokens, fewer than the 9 parallel",
        ),
    ],
)
def test_an_overlap_that_does_not_go_with_the_streams_is_refused(flags, message):
    with pytest.raises(RKMError, match=message):
        iterator(**{"tokens": 1000, **flags})


def test_a_large_text_is_not_copied_to_be_read_in_another_order():
    class Large:
        """A text of 10^12 tokens that are their places; it knows how many were read."""

        count = 0

        def __len__(self):
            return 10**12

        def read(self, first, stop):
            self.count += stop - first
            return np.arange(first, stop)

    text = Large()
    stream = TokenStream(text, EOS, "train")
    stream.fingerprint = lambda: ""
    items = StreamSegments(stream, 81, (0, 81), 70, PAD, None, (1, 1), 7)
    for index in (0, len(items) // 2, len(items) - 2):
        item = items[index]
        assert torch.equal(item["net_input"]["src_tokens"].clamp(min=0) + 1, item["target"])
    assert text.count < 4 * token_stream.BLOCK


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


def iterator(tokens=100, streams=4, length=5, seed=None, shift=0, shuffle=None, overlap=1):
    stream = TokenStream(torch.arange(tokens) + shift, 2, "train")
    segments = StreamSegments(stream, streams, (0, streams), length, 1, seed, shuffle, overlap)
    return SegmentIterator(segments)


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({}, {"length": 6}, "--tokens-per-sample: 5, now 6"),
        ({}, {"streams": 5}, "--batch-size times processes: 4, now 5"),
        ({}, {"tokens": 101}, "the training text"),
        ({}, {"shift": 1}, "the training text"),
        ({}, {"seed": (1, 1)}, "--variable-bptt: False, now True"),
        ({"seed": (1, 1)}, {"seed": (2, 1)}, "--seed, by which --variable-bptt and --partial-shuffle draw: 1, now 2"),
        (
            {"shuffle": (1, 1)},
            {"shuffle": (2, 1)},
            "--seed, by which --variable-bptt and --partial-shuffle draw: 1, now",
        ),
        ({}, {"shuffle": (1, 1)}, "--partial-shuffle: False, now True"),
        ({}, {"overlap": 3}, "--overlap: 1, now 3"),
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
    cut = {key: value for key, value in before.dataset.cut.items() if key not in SegmentIterator.OLDER}
    iterator(seed=(1, 1)).load_state_dict({**old, "cut": cut})  # and before there was another order
    with pytest.raises(RKMError, match="stopped after 99 segments of an epoch that has"):
        iterator().load_state_dict({**old, "iterations_in_epoch": 99})
