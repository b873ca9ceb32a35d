"""Batches of random sizes hold each sentence once, in one process and in several."""

import numpy as np
import pytest
import torch
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm import RKMError


@pytest.fixture(autouse=True, scope="module")
def _registered():
    fairseq_rkm.register()


class Sentences(FairseqDataset):
    """Sentences of given lengths, in order of length."""

    def __init__(self, lengths, shapes=None):
        self.sizes, self.shapes = np.array(lengths, dtype=np.int64), shapes

    def __getitem__(self, index):
        return index

    def __len__(self):
        return len(self.sizes)

    def num_tokens(self, index):
        return self.sizes[index]

    def num_tokens_vec(self, indices):
        return self.sizes[indices]

    def ordered_indices(self):
        return np.argsort(self.sizes, kind="stable")

    def get_batch_shapes(self):
        return self.shapes

    def collater(self, samples):
        return {"id": torch.tensor(samples)} if samples else {}


def batches(dataset, shards=1, shuffle=False, **limits):
    """What fairseq's commands go through, one list for each of the processes."""
    task = FairseqTask(OmegaConf.create({"seed": 1}))
    iterators = [
        task.get_batch_iterator(
            dataset, num_shards=shards, shard_id=shard, disable_iterator_cache=True, grouped_shuffling=shuffle, **limits
        ).next_epoch_itr(shuffle)
        for shard in range(shards)
    ]
    return [[sample["id"].tolist() if sample else [] for sample in iterator] for iterator in iterators]


LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=70)


@settings(max_examples=60, deadline=None)
@given(
    lengths=LENGTHS,
    max_tokens=st.none() | st.integers(30, 200),
    max_sentences=st.none() | st.integers(1, 40),
    multiple=st.integers(1, 20),
    shards=st.integers(1, 4),
    shuffle=st.booleans(),
)
def test_each_sentence_stands_in_one_batch(lengths, max_tokens, max_sentences, multiple, shards, shuffle):
    limits = {"max_tokens": max_tokens, "max_sentences": max_sentences, "required_batch_size_multiple": multiple}
    parts = batches(Sentences(lengths), shards, shuffle, **limits)
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(len(lengths)))
    assert len({len(part) for part in parts}) == 1, "processes that wait for each other have as many batches"
    sizes = sorted(len(batch) for part in parts for batch in part if batch)
    assert max_sentences is None or sizes[-1] <= max_sentences
    several = [size for size in sizes if size > multiple and size % multiple]
    assert len(several) <= 1, "all but the last batch are of the size that was asked for"
    if max_tokens is not None:
        for batch in (batch for part in parts for batch in part if batch):
            assert len(batch) * max(lengths[i] for i in batch) <= max_tokens


@settings(max_examples=20, deadline=None)
@given(lengths=LENGTHS, multiple=st.integers(1, 20))
def test_so_it_does_in_batches_of_fixed_shapes(lengths, multiple):
    dataset = Sentences(lengths, [(None, 10), (None, 30)])
    (part,) = batches(dataset, max_tokens=120, required_batch_size_multiple=multiple)
    assert sorted(i for batch in part for i in batch) == list(range(len(lengths)))


def test_no_sentences_make_no_batches():
    assert batches(Sentences([]), max_sentences=4, required_batch_size_multiple=8) == [[]]


def test_a_sentence_longer_than_a_batch_is_named():
    message = r"sentence 1 \(counted from 0\) has 12 tokens, more than the 10 that --max-tokens allows a batch: give --"
    with pytest.raises(RKMError, match=message):
        batches(Sentences([3, 12, 4]), max_tokens=10)
