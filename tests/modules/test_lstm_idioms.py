"""Lines that people write with an nn.LSTM: they mean the same with an RKM, or are refused in a sentence."""

import copy
import inspect
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import assert_close, randomized
from torch import nn
from torch.nn.utils import parametrizations, parametrize, skip_init

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.modules import LockedDropout

X = torch.randn(5, 2, 3)


@pytest.mark.parametrize("ngram", [1, 2])
def test_arguments_have_nn_lstm_s_names_too(ngram):
    rkm = randomized(RKM(3, 4, ngram=ngram))
    _, state = rkm(X)
    wanted, _ = rkm(X, state)
    for given in (rkm(input=X, hx=state), rkm(x=X, state=state), rkm(X, hx=state), rkm(hx=state, input=X)):
        assert torch.equal(given[0], wanted)
    with pytest.raises(RKMError, match="x and input are two names of one argument"):
        rkm(X, input=X)
    with pytest.raises(RKMError, match="state and hx are two names of one argument"):
        rkm(X, state, hx=state)
    with pytest.raises(RKMError, match="the input must be a tensor"):
        rkm(hx=state)


def test_truncated_backpropagation_by_a_tuple_of_detached_parts():
    lstm = nn.LSTM(3, 4, 2)
    rkm = RKM.from_lstm(lstm)
    state = lstm_state = None
    for _ in range(3):
        output, state = rkm(X, state)
        wanted, lstm_state = lstm(X, lstm_state)
        assert_close(output, wanted)
        gradients = (torch.autograd.grad(y.sum(), m.weight_hh_l0)[0] for y, m in ((output, rkm), (wanted, lstm)))
        assert_close(*(gradient.norm() for gradient in gradients))
        state, lstm_state = (tuple(part.detach() for part in pair) for pair in (state, lstm_state))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4, 2, True), "cell must be one of lstm, .*, not True. It is the fourth argument, .* by name"),
        ((3, 4, 2, False, True), "the fourth argument, where nn.LSTM has bias"),
        ((3, 4, 2, "lstm", True), "ngram must be a whole number, not True"),
        ((3, 4, 2, "lstm", 1, True), "unknown ngram_padding True"),
        ((3, 4, 2, "lstm", 1, "same", 0.5), "feedback must be True or False, not 0.5"),
        ((3, 4, 2, "lstm", 1, "same", None, 0.5), "bias must be True or False, not 0.5"),
        ((3, 4, True), "num_layers must be a whole number, not True"),
        ((3, 4.0), "hidden_size must be a whole number, not 4.0"),
        (("3", 4), "input_size must be a whole number, not '3'"),
    ],
)
def test_positions_of_nn_lstm_s_arguments_are_refused_where_they_would_be_misread(arguments, message):
    with pytest.raises(RKMError, match=message):
        RKM(*arguments)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("feedback", 0, "True or False"),
        ("bias", 1, "True or False"),
        ("layer_norm", 0.5, "True or False"),
        ("learn_sigma", "yes", "True or False"),
        ("bidirectional", None, "True or False"),
        ("batch_first", 0.1, "True or False"),
        ("sigma_i2", "0.5", "a number"),
        ("sigma_f2", False, "a number"),
        ("dropout", True, "a number"),
        ("dropout", "0.1", "a number"),
        ("dropout", LockedDropout(0.1), "a number"),
        ("weight_dropout", None, "a number"),
        ("state_dropout", "0.2", "a number"),
        ("forget_bias", True, "a number"),
        ("ngram", 2.0, "a whole number"),
        ("proj_size", 4, "not 4"),
        ("proj_size", True, "a whole number"),
        ("backend", ["auto"], "unknown backend"),
        ("ngram_padding", ["same"], "unknown ngram_padding"),
    ],
)
def test_arguments_of_another_type_are_refused_in_a_sentence(name, value, wanted):
    with pytest.raises(RKMError, match=wanted):
        RKM(3, 4, **{name: value})


def test_all_of_nn_lstm_s_arguments_are_taken_by_name():
    given = {
        "num_layers": 2, "bias": False, "batch_first": True, "dropout": 0, "bidirectional": True, "proj_size": 2,
        "device": "cpu", "dtype": torch.float64,
    }  # fmt: skip
    assert given.keys() <= inspect.signature(RKM).parameters.keys()
    lstm, rkm = nn.LSTM(input_size=3, hidden_size=4, **given), RKM(input_size=3, hidden_size=4, cell="lstm", **given)
    rkm.load_state_dict(lstm.state_dict())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert_close(rkm(x)[0], lstm(x)[0])
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional", "proj_size"):
        assert getattr(rkm, name) == getattr(lstm, name)
    assert RKM(np.int64(3), np.int32(4), dropout=np.float32(0.5)).dropout.p == 0.5


def test_flattening_does_nothing():
    rkm = RKM(3, 4)
    before = [parameter.data_ptr() for parameter in rkm.parameters()]
    assert rkm.flatten_parameters() is None
    assert [parameter.data_ptr() for parameter in rkm.parameters()] == before


@pytest.mark.parametrize("arguments", [{}, {"bidirectional": True, "num_layers": 2, "layer_norm": True}])
def test_initialization_by_the_names_of_all_weights(arguments):
    rkm = RKM(3, 4, **arguments)
    for names in rkm._all_weights:
        for name in filter(lambda name: "weight" in name, names):
            nn.init.constant_(getattr(rkm, name), 0.25)
    assert all(p.eq(0.25).all() for name, p in rkm.named_parameters() if "weight" in name)
    parameters = dict(rkm.named_parameters())
    assert list(chain(*rkm._all_weights)) == list(parameters)
    assert all(one is other for one, other in zip(chain(*rkm.all_weights), parameters.values(), strict=True))
    assert len(rkm.all_weights) == len(nn.LSTM(3, 4, rkm.num_layers, bidirectional=rkm.bidirectional).all_weights)
    assert all(one is other for one, other in zip(rkm._flat_weights, parameters.values(), strict=True))


def test_dropout_is_assigned_as_a_number():
    rkm = RKM(3, 4, num_layers=2)
    rkm.dropout = 0.5
    assert isinstance(rkm.dropout, LockedDropout)
    assert rkm.dropout.p == 0.5
    with pytest.raises(RKMError, match=r"dropout must lie within \[0, 1\), not be 1.5"):
        rkm.dropout = 1.5
    with pytest.raises(RKMError, match="dropout must be a number, not None"):
        rkm.dropout = None
    rkm.dropout = other = LockedDropout(0.25)
    assert rkm.dropout is other


def test_modules_without_storage_are_filled_later():
    for rkm in (
        RKM(3, 4, 2, "lstm", learn_sigma=True, device="meta").to_empty(device="cpu"),
        RKM(3, 4, layer_norm=True, bias=False).to("meta").to_empty(device="cpu"),
        skip_init(RKM, 3, 4, cell="linear_kernel", learn_sigma=True),
    ):
        with torch.no_grad():
            for parameter in rkm.parameters():
                parameter.fill_(torch.nan)
        rkm.reset_parameters()
        assert rkm(X)[0].isfinite().all()
        fresh = RKM(
            3, 4, rkm.num_layers, rkm.cell, layer_norm=rkm.layer_norm, bias=rkm.bias, learn_sigma=rkm.learn_sigma
        )
        for name, parameter in fresh.named_parameters():
            drawn = name.startswith(("weight", "bias"))
            assert drawn or torch.equal(rkm.get_parameter(name), parameter), "what starts at a value of its own"


def test_parametrized_weights_count_and_compute():
    rkm = RKM(4, 4, cell="lstm")
    count = rkm.num_weights()
    parametrizations.orthogonal(rkm, "weight_hh_l0")
    assert rkm.num_weights() == count
    wanted = RKM(4, 4, cell="lstm")
    parametrize.remove_parametrizations(rkm, "weight_hh_l0")
    wanted.load_state_dict(rkm.state_dict())
    x = torch.randn(5, 2, 4)
    assert torch.equal(rkm(x)[0], wanted(x)[0])


@pytest.mark.parametrize("cell", CELLS)
def test_no_rows_and_no_steps_are_taken(cell):
    rkm = RKM(3, 4, 2, cell, 2, bidirectional=True)
    output, state = rkm(torch.zeros(5, 0, 3))
    assert output.shape == (5, 0, 8)
    assert [tuple(tensor.shape) for tensor in state.tensors()] == [(4, 0, 4), (4, 0, 4), (1, 0, 3), (1, 0, 8)]
    _, state = rkm(X)
    output, left = rkm(X[:0], state)
    assert output.shape == (0, 2, 8)
    assert torch.equal(left.cell, state.cell)


def as_of_an_earlier_version(module, *later):
    """The module, unpickled from attributes that earlier versions had."""
    state = {name: value for name, value in module.__dict__.items() if not name.endswith("_text")}
    state |= {name: getattr(module, name) for name in later}
    unpickled = type(module).__new__(type(module))
    unpickled.__setstate__(copy.deepcopy(state))
    return unpickled


@pytest.mark.parametrize("weight_dropout", [0.0, 0.5])
def test_a_module_of_an_earlier_version_still_runs(weight_dropout):
    rkm = RKM(3, 4, 2, "linear_kernel", sigma_i2=0.3, dropout=0.25, weight_dropout=weight_dropout)
    earlier = as_of_an_earlier_version(rkm, "sigma_i2", "sigma_f2", "weight_dropout")
    earlier.dropout = as_of_an_earlier_version(rkm.dropout, "p")
    for name in ("proj_size", "learn_initial_state"):
        earlier.__dict__.pop(name, None)
    for module in (earlier, copy.deepcopy(earlier)):
        outputs = []
        for each in (rkm, module):
            torch.manual_seed(0)
            outputs.append(each(X)[0])
        assert torch.equal(*outputs)
        assert (module.proj_size, module.learn_initial_state, module.state_dropout) == (0, False, 0)
        assert (module.sigma_i2, module.weight_dropout, module.dropout.p) == (0.3, weight_dropout, 0.25)
