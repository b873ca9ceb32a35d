"""A checkpoint's carried state goes to whatever processes have the streams when the run goes on."""

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.data.token_stream import TokenStream
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig
from fairseq_rkm.modules.state import state_tensors
from fairseq_rkm.tasks import saved_streams
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingConfig, StatefulLanguageModelingTask

STREAMS, STEPS = 12, 3
DIVISIONS = [1, 2, 3, 4, 6, 12]
OTHER_ORDER = {"partial_shuffle": True, "overlap": 5, "variable_bptt": True}
TEXT = torch.randint(4, 9, (STREAMS * 50,), generator=torch.Generator().manual_seed(1))


class Rank:
    """One of several processes' task and model, as if it were alone."""

    def __init__(self, patch, world, rank, streams=STREAMS, order=None, **flags):
        self.patch, self.world, self.rank = patch, world, rank
        batch = streams // world
        values = {"batch_size": batch, "batch_size_valid": batch, "train_subset": "train", "update_freq": [1]}
        cfg = StatefulLanguageModelingConfig(
            **values, dataset_impl=None, distributed_world_size=world, tokens_per_sample=5, **(order or {})
        )
        dictionary = Dictionary()
        for i in range(5):
            dictionary.add_symbol(f"w{i}")
        self.task = StatefulLanguageModelingTask(OmegaConf.structured(cfg), dictionary)
        torch.manual_seed(0)
        sizes = {"decoder_embed_dim": 3, "decoder_hidden_size": 4, "decoder_layers": 2, "criterion_name": None}
        model = OmegaConf.structured(RKMLanguageModelConfig(**{**sizes, "dropout": 0.0, **flags}))
        self.model = RKMLanguageModelDecoder(model, dictionary, dictionary).train()
        self.task.training_state = self.model.carried[True]
        stream = TokenStream(TEXT, dictionary.eos(), "train")
        self.here()
        self.iterator = self.task.get_batch_iterator(
            stream, max_sentences=batch, num_shards=world, shard_id=rank, update_epoch_batch_itr=False
        )

    def here(self):
        """Let the next calls be this process's."""
        self.patch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: self.world)
        self.patch.setattr(distributed_utils, "get_data_parallel_rank", lambda: self.rank)

    def run(self, steps):
        batches = self.iterator.next_epoch_itr(shuffle=False)
        with torch.no_grad():
            inputs = [next(batches)["net_input"] for _ in range(steps)]
            return [self.model(item["src_tokens"], segment=item["segment"])[0] for item in inputs]


def save(patch, ranks):
    """The first process's checkpoint, in which all have gathered."""
    flats = []
    patch.setattr(distributed_utils, "get_data_parallel_group", lambda: None)

    def all_gather(into, own, group):
        for place, flat in zip(into, flats, strict=True):
            place.copy_(flat)

    patch.setattr(torch.distributed, "all_gather", all_gather)
    flats = [torch.cat([t.flatten() for t in state_tensors(rank.task.training_state.left)]) for rank in ranks]
    ranks[0].here()
    ranks[0].task.gather_checkpoint_state()
    state = ranks[0].task.get_checkpoint_dict()["StatefulLanguageModelingTask"]
    return state, ranks[0].iterator.state_dict()


@settings(max_examples=10, deadline=None)
@given(
    before=st.sampled_from(DIVISIONS), now=st.sampled_from(DIVISIONS), ngram=st.sampled_from([1, 2, 3, [3, 1], [1, 2]]),
    cell=st.sampled_from(["rkm_lstm", "gated_cnn"]), order=st.sampled_from([{}, OTHER_ORDER]),
)  # fmt: skip
def test_a_run_goes_on_in_any_division_of_its_streams(before, now, ngram, cell, order):
    flags = {"ngram": ngram, "cell": cell, "order": order}
    with pytest.MonkeyPatch.context() as patch:
        whole = Rank(patch, 1, 0, **flags).run(2 * STEPS)
        ranks = [Rank(patch, before, rank, **flags) for rank in range(before)]
        for rank in ranks:
            rank.run(STEPS)
        state, place = save(patch, ranks)
        rows = []
        for number in range(now):
            rank = Rank(patch, now, number, **flags)
            rank.iterator.load_state_dict(place)
            rank.task.set_checkpoint_dict(state)
            rows.append(rank.run(STEPS))
    for step in range(STEPS):
        resumed = torch.cat([row[step] for row in rows])
        torch.testing.assert_close(resumed, whole[STEPS + step], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_that_does_not_count_each_layer_s_tensors_has_as_many_for_all(monkeypatch):
    rank = Rank(monkeypatch, 1, 0, ngram=2)
    rank.run(STEPS)
    state, _ = save(monkeypatch, [rank])
    restored = saved_streams.restore({key: value for key, value in state.items() if key != "tensors"}, STREAMS)
    left = rank.task.training_state.left
    assert all(torch.equal(*pair) for pair in zip(state_tensors(restored), state_tensors(left), strict=True))
    assert [len(layer.tensors()) for layer in restored] == [3, 3]


def test_another_number_of_streams_is_refused_within_an_epoch_and_begins_one(monkeypatch):
    """Within an epoch the text's cut is refused before, unless the checkpoint does not know its own."""
    rank = Rank(monkeypatch, 2, 0)
    rank.run(STEPS)
    state, place = save(monkeypatch, [rank, rank])
    other = Rank(monkeypatch, 3, 0, streams=9)
    with pytest.raises(RKMError, match="--batch-size times processes: 12, now 9"):
        other.iterator.load_state_dict(place)
    del place["cut"]
    other.iterator.load_state_dict(place)
    with pytest.raises(RKMError, match=r"of 12 streams \(2 processes with --batch-size 6\), and .* 9 \(3 with 3\)"):
        other.task.set_checkpoint_dict(state)
    other.iterator.load_state_dict({**place, "epoch": 2, "iterations_in_epoch": 0})
    other.task.set_checkpoint_dict(state)
    assert other.task.training_state.left is None
    assert len(other.run(2)) == 2


def test_a_checkpoint_without_the_other_processes_states_is_not_written(monkeypatch):
    rank = Rank(monkeypatch, 1, 0)
    assert rank.task.get_checkpoint_dict() == {}
    rank.task.gather_checkpoint_state()
    rank.run(1)
    with pytest.raises(RKMError, match="was not gathered before this checkpoint"):
        rank.task.get_checkpoint_dict()
    rank.task.gather_checkpoint_state()
    assert rank.task.get_checkpoint_dict()
    with pytest.raises(RKMError, match="was not gathered before this checkpoint"):
        rank.task.get_checkpoint_dict()
