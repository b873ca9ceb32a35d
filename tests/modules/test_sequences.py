"""Sequences alone and packed, as nn.LSTM takes them."""

import pytest
import torch
from helpers import assert_close, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from fairseq_rkm import CELLS, RKM, RKMError, RKMState

DOUBLE = torch.float64
STACKS = [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]


def pair_of_modules(arguments):
    lstm = nn.LSTM(3, 5, dtype=DOUBLE, **arguments)
    return lstm, RKM.from_lstm(lstm)


def gradients(module, output, state, *leaves):
    loss = output.pow(2).sum() + (state[0] * state[1]).sum()
    return torch.autograd.grad(loss, leaves, retain_graph=True)  # both modules share the packing


@pytest.mark.parametrize("arguments", STACKS)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("stateful", [True, False])
def test_packed_sequences_are_nn_lstm_s(arguments, ordered, stateful):
    lstm, rkm = pair_of_modules(arguments)
    lengths = [6, 4, 4, 1] if ordered else [4, 1, 6, 4]
    x = torch.randn(6, 4, 3, dtype=DOUBLE, requires_grad=True)
    shape = 2, lstm.num_layers * (1 + lstm.bidirectional), 4, 5
    first = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=ordered)
    hx = (first[0], first[1]) if stateful else None
    wanted, wanted_state = lstm(packed, hx)
    output, state = rkm(packed, hx)
    assert isinstance(output, PackedSequence)
    assert output.sorted_indices is packed.sorted_indices
    assert output.unsorted_indices is packed.unsorted_indices
    assert torch.equal(output.batch_sizes, wanted.batch_sizes)
    assert_close(output.data, wanted.data)
    for one, other in zip(state, wanted_state, strict=True):
        assert_close(one, other)
    leaves = (x, first) if stateful else (x,)
    pairs = zip(
        gradients(rkm, output.data, state, *leaves), gradients(lstm, wanted.data, wanted_state, *leaves), strict=True
    )
    for one, other in pairs:
        assert_close(one, other)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(CELLS)), st.sampled_from([1, 2, 3]), st.booleans(), st.booleans(),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)  # fmt: skip
def test_a_packed_sequence_is_each_of_its_sequences_alone(cell, ngram, bidirectional, same, lengths):
    padding = "same" if same and ngram % 2 else "causal"
    rkm = RKM(3, 4, 2, cell, ngram, padding, bidirectional=bidirectional, backend="reference", dtype=DOUBLE)
    rkm = randomized(rkm)
    sequences = [torch.randn(length, 3, dtype=DOUBLE) for length in lengths]
    _, first = rkm(torch.randn(3, len(lengths), 3, dtype=DOUBLE))
    output, state = rkm(pack_sequence(sequences, enforce_sorted=False), first)
    padded, given_lengths = pad_packed_sequence(output)
    assert given_lengths.tolist() == lengths
    for row, sequence in enumerate(sequences):
        alone, final = rkm(sequence, first.map(lambda tensor, row=row: tensor[:, row]))
        assert_close(padded[: len(sequence), row], alone)
        for one, other in zip(state.tensors(), final.tensors(), strict=True):
            assert_close(one[:, row], other)


@pytest.mark.parametrize("arguments", STACKS)
@pytest.mark.parametrize("stateful", [True, False])
def test_one_sequence_alone_is_nn_lstm_s(arguments, stateful):
    lstm, rkm = pair_of_modules(arguments)
    x = torch.randn(6, 3, dtype=DOUBLE)
    first = torch.randn(2, lstm.num_layers * (1 + lstm.bidirectional), 5, dtype=DOUBLE)
    hx = (first[0], first[1]) if stateful else None
    wanted, wanted_state = lstm(x, hx)
    output, state = rkm(x, hx)
    assert_close(output, wanted)
    for one, other in zip(state, wanted_state, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("cell", CELLS)
def test_one_sequence_alone_is_a_batch_of_one(cell):
    rkm = randomized(RKM(3, 4, 2, cell, 3, bidirectional=True))
    x, mask = torch.randn(6, 3), torch.tensor([True, False, False, False, False, True])
    _, first = rkm(torch.randn(6, 1, 3))
    wanted, wanted_state = rkm(x.unsqueeze(1), first, mask.unsqueeze(0))
    output, state = rkm(x, first.map(lambda tensor: tensor.squeeze(1)), mask)
    assert torch.equal(output, wanted.squeeze(1))
    assert [tensor.dim() for tensor in state.tensors()] == [2, 2, 2, 2]
    for one, other in zip(state.tensors(), wanted_state.tensors(), strict=True):
        assert torch.equal(one, other.squeeze(1))


def test_what_does_not_fit_these_layouts_is_refused_in_a_sentence():
    rkm, x = RKM(3, 4, ngram=2), torch.zeros(5, 2, 3)
    packed = pack_padded_sequence(x, [5, 3])
    with pytest.raises(RKMError, match="a PackedSequence tells its padding: give no padding_mask beside it"):
        rkm(packed, padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(RKMError, match=r"m = 3, not \(8, 4\); .* PackedSequence \(steps, m\)"):
        rkm(pack_padded_sequence(torch.zeros(5, 2, 4), [5, 3]))
    _, state = rkm(x)
    with pytest.raises(RKMError, match=r"shape \(layers \* directions, d\) = \(1, 4\), not \(1, 2, 4\)"):
        rkm(x[:, 0], state)
    with pytest.raises(RKMError, match=r"padding_mask must be bool of shape \(T,\) = \(5,\), .* shape \(1, 5\)"):
        rkm(x[:, 0], padding_mask=torch.zeros(1, 5, dtype=torch.bool))
    alone = RKMState(*(torch.zeros(1, 4),) * 2, [torch.zeros(1, 2, 3)])
    with pytest.raises(RKMError, match=r"one tensor a layer of shapes \[\(1, 3\)\], not \[\(1, 2, 3\)\]"):
        rkm(x[:, 0], alone)
    with pytest.raises(RKMError, match="inputs are on cpu but the state on meta"):
        rkm(pack_padded_sequence(x, [3, 5], enforce_sorted=False), tuple(state.to("meta")))
