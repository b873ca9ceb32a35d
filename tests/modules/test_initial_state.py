"""A learned initial state is the state that sequences without one are given."""

import copy

import pytest
import torch
from helpers import assert_close, random_mask, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.modules import Stepper
from fairseq_rkm.ops import BACKENDS

DOUBLE = torch.float64
CPU_BACKENDS = [name for name in BACKENDS if name not in {"persistent", "blockwise", "stepwise", "scan"}]
LEARNERS = [
    (cell, feedback)
    for cell in CELLS
    for feedback in (None, False)
    if CELLS[cell].has_memory or (CELLS[cell].has_feedback and feedback is None)
]


def learner(*arguments, **options):
    return randomized(RKM(*arguments, learn_initial_state=True, **options))


def starts(rkm):
    return {name: p for name, p in rkm.named_parameters() if name.startswith("initial")}


@pytest.mark.parametrize(("cell", "feedback"), LEARNERS)
def test_each_layer_and_direction_starts_at_zeros_where_a_start_is_read(cell, feedback):
    rkm = RKM(3, 4, 2, cell, feedback=feedback, bidirectional=True, learn_initial_state=True)
    kinds = ["hidden"] * rkm.feedback + ["memory"] * CELLS[cell].has_memory
    places = [f"l{layer}{suffix}" for layer in range(2) for suffix in ("", "_reverse")]
    assert list(starts(rkm)) == [f"initial_{kind}_{place}" for place in places for kind in kinds]
    assert all(p.shape == (4,) and p.eq(0).all() for p in starts(rkm).values())
    plain = RKM(3, 4, 2, cell, feedback=feedback, bidirectional=True)
    assert rkm.num_weights() == plain.num_weights()
    assert not starts(plain)
    assert "learn_initial_state=True" in repr(rkm)
    randomized(rkm).reset_parameters()
    assert all(p.eq(0).all() for p in starts(rkm).values())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LEARNERS), st.sampled_from(CPU_BACKENDS), st.integers(1, 3), st.booleans(),
    st.sampled_from(["none", "right", "mixed"]), st.integers(0, 5),
)  # fmt: skip
def test_sequences_without_a_state_start_there_and_its_gradients_are_right(kind, backend, ngram, both, padding, steps):
    cell, feedback = kind
    dtype = DOUBLE
    if backend == "native":  # it is for float32, and for one step at least
        dtype, steps = torch.float32, max(1, steps)
    options = {"feedback": feedback, "bidirectional": both, "dtype": dtype}
    rkm = learner(3, 4, 2, cell, ngram, backend=backend, **options)
    plain = RKM(3, 4, 2, cell, ngram, backend="reference", **options)
    plain.load_state_dict({name: p for name, p in rkm.state_dict().items() if not name.startswith("initial")})
    x, mask = torch.randn(steps, 3, 3, dtype=dtype), random_mask(padding, 3, steps)
    given_state = rkm.initial_state(3).map(lambda tensor: tensor.detach().requires_grad_())
    results = []
    for module, state in ((rkm, None), (plain, given_state)):
        output, left = module(x, state, mask)
        results.append([output, *left.tensors()])
        (output.sin().sum() + left.hidden.cos().sum() + left.cell.sin().sum()).backward()
    for one, other in zip(*results, strict=True):
        assert_close(one, other)
    for name, parameter in starts(rkm).items():
        _, kind_of_start, place = name.split("_", 2)
        wanted = given_state.hidden.grad if kind_of_start == "hidden" else given_state.cell.grad
        assert_close(parameter.grad, wanted[rkm._places.index(place)].sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [None, 0, 2])
def test_the_initial_state_is_what_a_call_without_a_state_starts_from(dtype, batch):
    rkm = learner(3, 4, 2, ngram=3, bidirectional=True, dtype=dtype)
    state = rkm.initial_state(batch)
    x = torch.randn(5, 3, dtype=dtype) if batch is None else torch.randn(5, batch, 3, dtype=dtype)
    output, left = rkm(x)
    assert torch.equal(output, rkm(x, state)[0])
    for one, other in zip(left.tensors(), state.tensors(), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert RKM(3, 4).initial_state(2).hidden.eq(0).all()
    assert RKM(3, 4).initial_state(2).context is None


def test_packed_sequences_autocast_and_steps_start_there():
    rkm = learner(3, 4, ngram=2)
    x = torch.randn(4, 2, 3)
    wanted, left = rkm(x, rkm.initial_state(2))
    packed = pack_padded_sequence(x, [4, 4])
    assert torch.equal(rkm(packed)[0].data.view_as(wanted), wanted)
    output, _ = Stepper(rkm)(x[:1], rkm.initial_state(2))
    assert_close(output, wanted[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, left = rkm(x)
        assert torch.equal(output, rkm(x, rkm.initial_state(2))[0])
    left.hidden.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in starts(rkm).values())


def test_a_row_without_a_step_and_a_clipped_cell_leave_the_start_as_it_is():
    rkm = RKM(3, 4, memory_clip=0.5, learn_initial_state=True)
    with torch.no_grad():
        rkm.initial_memory_l0.fill_(2.0)
        rkm.initial_hidden_l0.fill_(3.0)
    _, state = rkm(torch.randn(5, 2, 3), padding_mask=torch.tensor([[False] * 5, [True] * 5]))
    assert state.cell[0, 1].eq(2).all()
    assert state.hidden[0, 1].eq(3).all()
    assert state.cell[0, 0].abs().max() <= 0.5


def test_a_target_that_only_the_start_can_reach_is_learned():
    rkm = RKM(2, 3, cell="lstm", learn_initial_state=True)
    optimizer = torch.optim.Adam(starts(rkm).values(), lr=0.1)
    x, target = torch.zeros(1, 4, 2), rkm(torch.randn(3, 4, 2))[0][-1:, :1].detach()
    losses = []
    for _ in range(60):
        loss = (rkm(x)[0] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("arguments", [{"cell": "cnn"}, {"cell": "gated_cnn"}])
def test_a_cell_without_state_refuses_to_learn_one(arguments):
    with pytest.raises(RKMError, match="has no state to learn: leave learn_initial_state out"):
        RKM(3, 4, learn_initial_state=True, **arguments)
    with pytest.raises(RKMError, match="learn_initial_state must be True or False, not 1"):
        RKM(3, 4, learn_initial_state=1)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_an_lstm_start_from_zeros_and_a_learned_start_is_no_lstm_s(bias):
    lstm = nn.LSTM(3, 4, 2, bias=bias)
    rkm = learner(3, 4, 2, "lstm", bias=bias)
    with pytest.raises(RKMError, match=r"nn\.LSTM starts from zeros"):
        rkm.to_lstm()
    before = copy.deepcopy(rkm)
    before.load_state_dict(rkm.state_dict())
    x = torch.randn(5, 2, 3)
    assert torch.equal(before(x)[0], rkm(x)[0])
    rkm.load_state_dict(lstm.state_dict())
    assert_close(rkm(x)[0], lstm(x)[0])
    assert_close(rkm.to_lstm()(x)[0], lstm(x)[0])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lstm.load_state_dict(before.state_dict())
