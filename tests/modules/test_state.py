"""The state is nn.LSTM's pair for all code that takes it apart, and keeps its context for all code that does not."""

import collections
import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close, randomized
from torch import nn
from torch.distributed.utils import _recursive_to
from torch.utils import _pytree, data

from fairseq_rkm import RKM, RKMError, RKMState

X = torch.randn(5, 2, 3)


def state_of(ngram):
    return randomized(RKM(3, 4, num_layers=2, ngram=ngram))(X)[1]


def assert_same(given, wanted):
    assert type(given) is RKMState
    assert (given.context is None) == (wanted.context is None)
    assert len(given.tensors()) == len(wanted.tensors())
    assert all(torch.equal(one, other) for one, other in zip(given.tensors(), wanted.tensors(), strict=True))


@pytest.mark.parametrize("ngram", [1, 3])
def test_a_state_is_a_pair(ngram):
    state = state_of(ngram)
    hidden, memory = state
    assert len(state) == 2
    assert isinstance(state, tuple)
    assert (hidden is state.hidden, hidden is state[0]) == (True, True)
    assert (memory is state.cell, memory is state[-1]) == (True, True)
    assert state == (hidden, memory)
    assert [c.shape for c in state.context or []] == ([] if ngram == 1 else [(2, 2, 3), (2, 2, 4)])
    assert ("context=None" in repr(state)) == (ngram == 1)
    assert tuple(part.detach() for part in state)[1].grad_fn is None


@pytest.mark.parametrize("ngram", [1, 3])
def test_what_keeps_a_state_whole(ngram):
    state = state_of(ngram).detach()
    assert_same(copy.copy(state), state)
    assert_same(copy.deepcopy(state), state)
    assert_same(pickle.loads(pickle.dumps(state)), state)  # noqa: S301 - its own
    assert_same(_pytree.tree_map(torch.clone, state), state)
    assert_same(state.to("cpu", torch.float64).to(torch.float32), state)
    assert_same(state.index_select(torch.tensor([1, 0])).index_select(torch.tensor([1, 0])), state)
    assert_same(state._replace(), state)
    assert_same(state._replace(hidden=state.cell)._replace(hidden=state.hidden), state)
    moved = state.to(torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in moved.tensors())


EarlierState = collections.namedtuple("RKMState", ["hidden", "cell", "context"], module="fairseq_rkm.modules.rkm")
"""The state of earlier versions, a triple."""


@pytest.mark.parametrize("ngram", [1, 3])
def test_files_hold_states_and_are_loaded_safely(ngram, monkeypatch):
    state, file = state_of(ngram).detach(), io.BytesIO()
    torch.save({"state": state}, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True)["state"], state)
    earlier = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("fairseq_rkm.modules.rkm.RKMState", EarlierState)
        torch.save(EarlierState(*state, state.context), earlier)
    earlier.seek(0)
    assert_same(torch.load(earlier, weights_only=True), state)


@pytest.mark.parametrize("ngram", [1, 3])
def test_pytrees_name_each_tensor(ngram):
    state = state_of(ngram)
    names = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(state)[0]]
    assert names == [".hidden", ".cell", ".context[0]", ".context[1]"][: 2 if ngram == 1 else 4]
    _, structure = _pytree.tree_flatten([state])
    assert _pytree.treespec_loads(_pytree.treespec_dumps(structure)) == structure


@pytest.mark.parametrize("ngram", [1, 3])
def test_data_parallel_modules_hand_on_a_state_that_tells_of_its_loss(ngram):
    ((moved,),) = _recursive_to((state_of(ngram).detach(),), torch.device("cpu"), False)
    assert type(moved) is RKMState
    assert moved.context is None


def test_a_data_loader_pins_a_state_whole(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor.clone())
    state = state_of(3).detach()
    assert_same(data._utils.pin_memory.pin_memory([state])[0], state)


class Owner(nn.Module):
    """A module that builds, reads and returns states."""

    def forward(self, x, state=None):
        if state is None:
            state = RKMState(x, x + 1, [x + 2])
        hidden, memory = state
        total = hidden * memory + state.hidden + state[1] + sum(tensor.sum() for tensor in state.tensors())
        return total, state.map(lambda tensor: tensor * 2).detach()


def test_compiled_code_takes_and_gives_states():
    compiled, owner = torch.compile(Owner(), backend="eager", fullgraph=True), Owner()
    state = wanted_state = None
    for _ in range(2):
        output, state = compiled(X, state)
        wanted, wanted_state = owner(X, wanted_state)
        assert torch.equal(output, wanted)
        assert_same(state, wanted_state)


@pytest.mark.parametrize("ngram", [1, 3])
def test_exported_programs_take_and_give_states_and_are_saved(ngram):
    rkm = randomized(RKM(3, 4, num_layers=2, ngram=ngram))
    _, state = rkm(X)
    program = torch.export.export(rkm, (X, state.detach()))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    output, left = torch.export.load(file).module()(X, state)
    wanted, wanted_left = rkm(X, state)
    assert_close(output, wanted)
    assert type(left) is RKMState
    for given, tensor in zip(left.tensors(), wanted_left.tensors(), strict=True):
        assert_close(given, tensor)


def test_a_pair_has_an_empty_context_and_a_state_that_lost_its_own_is_told():
    rkm = randomized(RKM(3, 4, ngram=3))
    _, state = rkm(X)
    empty = RKMState(*state, [torch.zeros_like(state.context[0])])
    wanted, _ = rkm(X, empty)
    assert not torch.equal(wanted, rkm(X, state)[0])
    assert torch.equal(rkm(X, tuple(state))[0], wanted)
    assert torch.equal(rkm(X, list(state))[0], wanted)
    with pytest.warns(UserWarning, match="this RKMState has no n-gram context") as warnings:
        assert torch.equal(rkm(X, RKMState(*state))[0], wanted)
    assert warnings[0].filename == __file__, "it names the user's line"
    RKM(3, 4)(X, RKMState(*state))


class FromTensors(nn.Module):
    """A module that takes and gives a state's tensors, for code that loses the context."""

    def __init__(self, rkm):
        super().__init__()
        self.rkm = rkm

    def forward(self, x, hidden, memory, context):
        output, state = self.rkm(x, RKMState(hidden, memory, [context]))
        return output, *state.tensors()


@pytest.mark.filterwarnings("ignore")
def test_a_trace_loses_no_context_in_silence():
    rkm = randomized(RKM(3, 4, ngram=3))
    _, state = rkm(X)
    with pytest.raises(RKMError, match=r"torch\.jit\.trace takes a state apart and loses its n-gram context"):
        torch.jit.trace(rkm, (X, state), check_trace=False)
    traced = torch.jit.trace(FromTensors(rkm), (X, *state.detach().tensors()))
    output, *left = traced(X, *state.tensors())
    wanted, wanted_left = rkm(X, state)
    assert_close(output, wanted)
    for given, tensor in zip(left, wanted_left.tensors(), strict=True):
        assert_close(given, tensor)
    torch.jit.trace(RKM(3, 4), (X, (state[0].detach(), state[1].detach())), check_trace=False)
