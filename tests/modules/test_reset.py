"""``reset`` and ``return_memory`` of the module, against sequences and steps run one by one."""

import copy
import itertools

import pytest
import torch
from helpers import DEVICES, assert_close, random_mask, random_reset, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops.segments import Reset

DOUBLE = torch.float64


@st.composite
def stacks(draw):
    ngram, padding = draw(st.sampled_from([(1, "causal"), (3, "causal"), (3, "same"), (5, "same")]))
    cell, feedback = draw(st.sampled_from(sorted(CELLS))), draw(st.sampled_from([None, False]))
    return {
        "cell": cell, "feedback": feedback, "ngram": ngram, "ngram_padding": padding,
        "num_layers": draw(st.integers(1, 2)), "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()), "proj_size": draw(st.sampled_from([0, 2])),
        "learn_initial_state": CELLS[cell].has_memory and draw(st.booleans()),
    }  # fmt: skip


def laid_out(rkm, x):
    """``(T, B, ...)`` as the module takes and gives it."""
    return x.transpose(0, 1) if rkm.batch_first else x


@given(arguments=stacks(), steps=st.integers(1, 7), batch=st.integers(1, 3), mask=st.data())
@settings(max_examples=60, deadline=None)
def test_each_part_of_a_row_is_a_sequence_of_its_own(arguments, steps, batch, mask):
    rkm = randomized(RKM(2, 3, dtype=DOUBLE, **arguments))
    x = torch.randn(steps, batch, 2, dtype=DOUBLE)
    marks = mask.draw(st.lists(st.booleans(), min_size=steps * batch, max_size=steps * batch))
    reset = torch.tensor(marks).view(batch, steps)
    padding = random_mask(mask.draw(st.sampled_from(["none", "left", "right", "mixed"])), batch, steps)
    output, _, memories = rkm(laid_out(rkm, x), None, padding, reset=reset, return_memory=True)
    output, memories = laid_out(rkm, output), laid_out(rkm, memories)
    for row in range(batch):
        cuts = sorted({0, steps, *(t for t in range(steps) if reset[row, t])})
        for first, last in itertools.pairwise(cuts):
            part = laid_out(rkm, x[first:last, row : row + 1])
            mask_of_part = None if padding is None else padding[row : row + 1, first:last]
            wanted, _, wanted_memories = rkm(part, None, mask_of_part, return_memory=True)
            assert_close(output[first:last, row : row + 1], laid_out(rkm, wanted))
            assert_close(memories[first:last, row : row + 1], laid_out(rkm, wanted_memories))


@given(arguments=stacks(), steps=st.integers(2, 6), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_loop_with_done_is_one_call(arguments, steps, seed):
    """As in reinforcement learning: one step at a time, the state dropped where the episode before has ended."""
    rkm = randomized(RKM(2, 3, dtype=DOUBLE, **arguments | {"bidirectional": False, "ngram_padding": "causal"}))
    torch.manual_seed(seed)
    x, done = torch.randn(steps, 3, 2, dtype=DOUBLE), torch.rand(3, steps) < 0.4
    state, outputs, memories = None, [], []
    for t in range(steps):
        step = laid_out(rkm, x[t : t + 1])
        output, state, memory = rkm(step, state, reset=done[:, t : t + 1], return_memory=True)
        outputs.append(laid_out(rkm, output))
        memories.append(laid_out(rkm, memory))
        assert_close(memories[-1][0], state.cell[-1])
    output, final, all_memories = rkm(laid_out(rkm, x), reset=done, return_memory=True)
    assert_close(laid_out(rkm, output), torch.cat(outputs))
    assert_close(laid_out(rkm, all_memories), torch.cat(memories))
    for given_, wanted in zip(final.tensors(), state.tensors(), strict=True):
        assert_close(given_, wanted)


def test_the_backward_direction_ends_in_the_first_part_s_state():
    rkm = randomized(RKM(2, 3, bidirectional=True, ngram=3, dtype=DOUBLE))
    x, reset = torch.randn(6, 1, 2, dtype=DOUBLE), torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 2] = True
    state = tuple(torch.randn(2, 2, 1, 3, dtype=DOUBLE))
    output, final = rkm(x, state, reset=reset)
    first, second = (rkm(x[part], None) for part in (slice(0, 2), slice(2, 6)))
    for given_, ends in zip(final, zip(second[1], first[1], strict=True), strict=True):
        assert_close(given_, torch.stack([ends[0][0], ends[1][1]]))
    # The state that is given enters at the row's last step, in its second part.
    assert_close(output[:2, :, 3:], first[0][:, :, 3:])
    assert_close(output[2:, :, 3:], rkm(x[2:], state)[0][:, :, 3:])


@pytest.mark.parametrize("ngram", [1, 3])
def test_nowhere_is_the_same_as_no_mask(ngram):
    rkm = randomized(RKM(2, 3, num_layers=2, bidirectional=True, ngram=ngram))
    x = torch.randn(5, 4, 2)
    wanted, state = rkm(x)
    output, same = rkm(x, reset=torch.zeros(4, 5, dtype=torch.bool))
    assert torch.equal(output, wanted)
    assert all(torch.equal(a, b) for a, b in zip(same.tensors(), state.tensors(), strict=True))


def test_every_step_anew_is_a_network_without_memory():
    rkm = randomized(RKM(2, 3, ngram=3, dtype=DOUBLE))
    x = torch.randn(5, 4, 2, dtype=DOUBLE)
    output, state = rkm(x, reset=torch.ones(4, 5, dtype=torch.bool))
    alone, _ = rkm(x.view(1, 20, 2))
    assert_close(output.view(1, 20, 3), alone)
    assert state.context[0][:-1].eq(0).all()
    assert torch.equal(state.context[0][-1], x[-1])


def test_one_sequence_alone_and_packed_sequences():
    rkm = randomized(RKM(2, 3, num_layers=2, bidirectional=True, ngram=3, dtype=DOUBLE))
    x, reset, lengths = torch.randn(6, 3, 2, dtype=DOUBLE), random_reset(3, 6), [2, 6, 4]
    padding = torch.arange(6) >= torch.tensor(lengths).unsqueeze(1)
    assert (reset & padding).any()  # behind the end of a packed sequence, where no step is
    wanted, final, wanted_memories = rkm(x, None, padding, reset=reset & ~padding, return_memory=True)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, state, memories = rkm(packed, reset=reset, return_memory=True)
    assert_close(pad_packed_sequence(output)[0], wanted)
    assert_close(pad_packed_sequence(memories)[0], wanted_memories)
    for given_, value in zip(state.tensors(), final.tensors(), strict=True):
        assert_close(given_, value)
    for row, length in enumerate(lengths):
        alone = rkm(x[:length, row], reset=reset[row, :length], return_memory=True)
        assert_close(alone[0], wanted[:length, row])
        assert_close(alone[2], wanted_memories[:length, row])
        assert_close(alone[1].cell, final.cell[:, row])
    with pytest.raises(RKMError, match="the rows of a PackedSequence are sorted"):
        rkm(packed, reset=Reset(reset.t()))
    with pytest.raises(RKMError, match=r"reset must be bool of shape \(T,\) = \(6,\)"):
        rkm(x[:, 0], reset=reset)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty_batches(shape):
    steps, batch = shape
    rkm = RKM(2, 3, ngram=2, bidirectional=True)
    x, reset = torch.zeros(steps, batch, 2), torch.ones(batch, steps, dtype=torch.bool)
    output, state, memories = rkm(x, reset=reset, return_memory=True)
    assert output.shape == memories.shape == (steps, batch, 6)
    assert state.hidden.shape == (2, batch, 3)


def test_masks_that_do_not_fit_are_refused_in_a_sentence():
    rkm, x = RKM(2, 3), torch.zeros(5, 4, 2)
    for mask, message in (
        (torch.zeros(5, 4, dtype=torch.bool), r"reset must be bool of shape \(B, T\) = \(4, 5\)"),
        (torch.zeros(4, 5), r"reset must be bool of shape .*, not torch.float32"),
        ([True], "reset must be a tensor on cpu, as the input is, not list"),
        (Reset(torch.zeros(4, 5, dtype=torch.bool)), r"reset.mask must be bool of shape \(T, B\) = \(5, 4\)"),
    ):
        with pytest.raises(RKMError, match=message):
            rkm(x, reset=mask)


def test_modules_may_share_one_reading_of_the_mask():
    rkm, x, mask = randomized(RKM(2, 3, bidirectional=True)), torch.randn(5, 4, 2), random_reset(4, 5)
    shared = Reset(mask.t())
    for _ in range(2):
        assert torch.equal(rkm(x, reset=shared)[0], rkm(x, reset=mask)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dropout", [0.0, 0.5])
def test_memories_go_with_the_same_dropped_weights(device, weight_dropout):
    rkm = randomized(RKM(2, 30, cell="lstm", weight_dropout=weight_dropout, dtype=DOUBLE)).to(device).train()
    _, state, memories = rkm(torch.randn(6, 2, 2, dtype=DOUBLE, device=device), return_memory=True)
    assert_close(memories[-1], state.cell[0])


def test_memories_of_an_lstm_are_pytorch_s():
    lstm = nn.LSTM(3, 5, dtype=DOUBLE)
    cell = nn.LSTMCell(3, 5, dtype=DOUBLE)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    rkm = RKM.from_lstm(lstm)
    x = torch.randn(7, 2, 3, dtype=DOUBLE, requires_grad=True)
    state, wanted = None, []
    for step in x:
        state = cell(step, state)
        wanted.append(state[1])
    *_, memories = rkm(x, return_memory=True)
    assert_close(memories, torch.stack(wanted))
    pair = [torch.autograd.grad(value.sin().sum(), x)[0] for value in (memories, torch.stack(wanted))]
    assert_close(*pair)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_the_memories_are_float32(device):
    rkm, x = randomized(RKM(4, 8, ngram=2)).to(device), torch.randn(6, 3, 4, device=device)
    exact = rkm(x, reset=random_reset(3, 6).to(device), return_memory=True)[2]
    with torch.autocast(device, dtype=torch.bfloat16):
        output, state, memories = rkm(x, reset=random_reset(3, 6).to(device), return_memory=True)
    assert (output.dtype, state.cell.dtype, memories.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert_close(memories, exact, dtype=torch.bfloat16)


def test_derivatives_of_second_order_and_torch_func():
    rkm = randomized(RKM(2, 3, ngram=2, dtype=DOUBLE))
    exact = copy.deepcopy(rkm)
    exact.backend = "reference"
    x, reset = torch.randn(5, 3, 2, dtype=DOUBLE), random_reset(3, 5)

    def loss(module, x):
        output, _, memories = module(x, reset=reset, return_memory=True)
        return (output.sin() * memories).sum()

    results = []
    for module in (rkm, exact):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(module, leaf), leaf, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), leaf)[0])
    assert_close(*results)
    leaf = x.clone().requires_grad_()
    assert_close(torch.func.grad(lambda x: loss(rkm, x))(x), torch.autograd.grad(loss(rkm, leaf), leaf)[0])
