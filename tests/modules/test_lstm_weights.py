"""Weights that are exchanged with PyTorch's modules are the same function, or are refused."""

import copy
import io

import pytest
import torch
from helpers import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fairseq_rkm import RKM, RKMError

CHANGES = {
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.4),
    "pruned twice": lambda module, name: prune.random_unstructured(prune.l1_unstructured(module, name, 0.4), name, 0.4),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
}
"""What PyTorch's users do to a weight: it is then no parameter, but computed from others."""


class Model(nn.Module):
    """A recurrent module under some other module's name."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.out = rnn, nn.Linear(5, 2)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def bare(state_dict):
    """Without what it records beside tensors, as fairseq's checkpoints and dicts made anew are."""
    return dict(state_dict)


def of_an_earlier_version(rkm):
    """The module's state dict without the key that tells whose weights are."""
    state_dict = rkm.state_dict()
    for key in [key for key in state_dict if "stacked" in key]:
        del state_dict[key]
    return state_dict


def assert_same_function(rkm, lstm):
    x = torch.randn(4, 2, 3)
    assert_close(rkm(x)[0], lstm(x)[0])


@pytest.mark.parametrize("change", [through_a_file, bare])
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("strict", [True, False])
def test_an_lstm_s_weights_with_biases_are_converted(arguments, change, strict):
    lstm, rkm = nn.LSTM(3, 5, **arguments), RKM(3, 5, cell="lstm", **arguments)
    rkm.load_state_dict(change(lstm.state_dict()), strict=strict)
    assert_same_function(rkm, lstm)
    model = Model(RKM(3, 5, cell="lstm", **arguments))
    model.load_state_dict(change(Model(lstm).state_dict()), strict=strict)
    assert_same_function(model.rnn, lstm)


@pytest.mark.parametrize("change", [lambda state: state, through_a_file])
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("assign", [False, True])
def test_an_lstm_s_weights_without_biases_are_converted(arguments, change, assign):
    lstm, rkm = nn.LSTM(3, 5, bias=False, **arguments), RKM(3, 5, cell="lstm", bias=False, **arguments)
    kept = copy.deepcopy(lstm.state_dict())
    state_dict = change(lstm.state_dict())
    rkm.load_state_dict(state_dict, assign=assign)
    assert_same_function(rkm, lstm)
    model = Model(RKM(3, 5, cell="lstm", bias=False, **arguments))
    model.load_state_dict(change(Model(lstm).state_dict()), assign=assign)
    assert_same_function(model.rnn, lstm)
    assert all(torch.equal(kept[name], value) for name, value in lstm.state_dict().items()), "which are the LSTM's"


@pytest.mark.parametrize("arguments", [{}, {"bias": False}])
@pytest.mark.parametrize("cell", ["lstm", "rkm_lstm", "rkm_cifg", "linear_kernel", "linear_kernel_gated", "ran", "cnn"])
@pytest.mark.parametrize("change", [lambda state: state, through_a_file, bare])
def test_an_rkm_s_weights_are_loaded_as_they_are(arguments, cell, change):
    rkm = RKM(3, 5, cell=cell, **arguments)
    for source in (rkm, Model(rkm), nn.Sequential(nn.ModuleList([rkm]))):
        target = copy.deepcopy(source)
        for parameter in target.parameters():
            parameter.data.zero_()
        for strict in (True, False):
            keys = target.load_state_dict(change(source.state_dict()), strict=strict)
            assert not keys.missing_keys
            assert not keys.unexpected_keys
            assert all(torch.equal(p, q) for p, q in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("cell", ["lstm", "rkm_lstm", "rkm_cifg", "linear_kernel", "ran"])
@pytest.mark.parametrize("bias", [True, False])
def test_so_are_those_of_an_earlier_version(cell, bias):
    rkm = RKM(3, 5, cell=cell, bias=bias)
    for source in (rkm, Model(rkm)):
        for change in (lambda state: state, through_a_file) + ((bare,) if bias else ()):
            target = copy.deepcopy(source)
            for parameter in target.parameters():
                parameter.data.zero_()
            target.load_state_dict(change(of_an_earlier_version(source)))
            assert all(torch.equal(p, q) for p, q in zip(source.parameters(), target.parameters(), strict=True))


def test_weights_that_do_not_say_whose_they_are_are_refused_until_they_do():
    rkm = RKM(3, 5, cell="lstm", bias=False)
    state_dict = bare(of_an_earlier_version(Model(rkm)))
    target = Model(RKM(3, 5, cell="lstm", bias=False))
    for strict in (True, False):
        with pytest.raises(RKMError, match="have no biases and do not say whose they are") as refusal:
            target.load_state_dict(state_dict, strict=strict)
    remedy = "state_dict['rnn.stacked_candidate_input_forget_output'] = torch.empty(0)"
    assert remedy in str(refusal.value)
    exec(remedy, {"state_dict": state_dict, "torch": torch})  # noqa: S102 - the line that a user is told to write
    target.load_state_dict(state_dict)
    assert torch.equal(target.rnn.weight_hh_l0, rkm.weight_hh_l0)
    with pytest.raises(RKMError, match="do not say whose they are"):
        RKM(3, 5, cell="lstm").load_state_dict(bare(nn.LSTM(3, 5, bias=False).state_dict()), strict=False)


@pytest.mark.parametrize(
    ("module", "cell"),
    [(nn.LSTM, "rkm_lstm"), (nn.GRU, "rkm_cifg"), (nn.RNN, "linear_kernel"), (nn.GRU, "ran"), (nn.LSTM, "gated_cnn")],
)
@pytest.mark.parametrize("bias", [True, False])
def test_other_functions_weights_are_refused(module, cell, bias):
    state_dict = module(3, 5, bias=bias).state_dict()
    with pytest.raises((RKMError, RuntimeError), match=r"only cell='lstm' takes nn\.LSTM's|key|size"):
        RKM(3, 5, cell=cell, bias=bias).load_state_dict(state_dict)
    if bias or cell in {"rkm_lstm", "rkm_cifg", "linear_kernel"}:
        with pytest.raises(RKMError, match=r"only cell='lstm' takes nn\.LSTM's"):
            RKM(3, 5, cell=cell, bias=bias).load_state_dict(state_dict, strict=False)


def test_a_projection_or_another_size_is_refused():
    for other in (nn.LSTM(3, 4), nn.GRU(3, 5), nn.LSTM(2, 5), nn.LSTM(3, 5, proj_size=2)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            RKM(3, 5, cell="lstm").load_state_dict(other.state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("module", "cell"), [(nn.LSTM, "lstm"), (nn.LSTM, "rkm_lstm"), (nn.GRU, "rkm_cifg"), (nn.RNN, "linear_kernel")]
)
def test_pytorch_s_modules_refuse_an_rkm_s_weights(module, cell, bias):
    state_dict = RKM(3, 5, cell=cell, bias=bias).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key.*" + ("bias_l0" if bias else "stacked_candidate")):
        module(3, 5, bias=bias).load_state_dict(state_dict)


def test_the_mark_survives_what_is_done_to_state_dicts():
    """Types, averages and movements: it is an empty tensor of floating-point numbers."""
    rkm = RKM(3, 5, cell="lstm", bias=False)
    halved = {name: (value.half() + value.half()) / 2 for name, value in rkm.state_dict().items()}
    target = RKM(3, 5, cell="lstm", bias=False)
    target.load_state_dict(halved)
    assert_close(target.weight_ih_l0.half(), rkm.weight_ih_l0.half())
    assert sum(p.numel() for p in rkm.parameters()) == sum(v.numel() for v in rkm.state_dict().values())


def changed(module, change):
    """Two weights replaced, and all parameters changed once more, as by an optimizer: attributes are stale."""
    for name in ("weight_hh_l0", "weight_ih_l1_reverse"):
        CHANGES[change](module, name)
    module(torch.randn(4, 2, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    return module


def kept(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_are_computed_from_others_are_copied_as_they_act(change, training):
    arguments = {"num_layers": 2, "bidirectional": True}
    makers = {
        "from_lstm": (lambda: nn.LSTM(3, 5, **arguments), RKM.from_lstm),
        "to_lstm": (lambda: RKM(3, 5, cell="lstm", **arguments), RKM.to_lstm),
    }
    for make, convert in makers.values():
        source = changed(make(), change).train(training)
        before = kept(source)
        result = convert(source)
        assert result.training is training
        assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
        assert all(part.training is training for part in source.modules())
        x = torch.randn(4, 2, 3)
        assert_close(result.eval()(x)[0], source.eval()(x)[0])
        source.train()(x)[0].sum().backward()
        assert all(p.grad is not None for p in source.parameters()), "the source is trained as before"


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_frozen_weights_stay_frozen(change):
    lstm = nn.LSTM(3, 5, 2, bidirectional=True)
    if change:
        changed(lstm, change)
    for name, parameter in lstm.named_parameters():
        frozen = ("weight_hh_l0", "bias_ih_l0", "bias_hh_l1", "bias_ih_l1")
        parameter.requires_grad_(not name.removeprefix("parametrizations.").startswith(frozen))
    rkm = RKM.from_lstm(lstm)
    trained = {name for name, p in rkm.named_parameters() if p.requires_grad}
    both = {"weight_hh_l0", "weight_hh_l0_reverse", "bias_l1", "bias_l1_reverse"}
    assert trained == {name for name, _ in rkm.named_parameters()} - both, "of bias_l0 one half is trained"
    back = rkm.to_lstm()
    assert {name for name, p in RKM.from_lstm(back).named_parameters() if p.requires_grad} == trained
    assert back.bias_hh_l1.requires_grad is back.bias_ih_l1.requires_grad is False


def test_another_module_is_refused():
    for module in (nn.GRU(3, 5), nn.DataParallel(nn.LSTM(3, 5)), RKM(3, 5)):
        with pytest.raises(RKMError, match=r"from_lstm takes a torch\.nn\.LSTM, not an? " + type(module).__name__):
            RKM.from_lstm(module)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_dropout_and_layout_are_kept(dtype):
    lstm = nn.LSTM(3, 5, 2, dropout=0.3, batch_first=True, dtype=dtype)
    rkm = RKM.from_lstm(lstm)
    for module in (lstm, rkm.to_lstm(), RKM.from_lstm(rkm.to_lstm())):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module.batch_first
    assert rkm.dropout.p == rkm.to_lstm().dropout == 0.3
    assert RKM.from_lstm(nn.LSTM(3, 5, device="meta")).weight_hh_l0.is_meta


def test_a_pruned_lstm_s_weights_are_converted():
    for bias in (True, False):
        lstm, rkm = nn.LSTM(3, 5, bias=bias), RKM(3, 5, cell="lstm", bias=bias)
        for module in (lstm, rkm):
            prune.random_unstructured(module, "weight_hh_l0", 0.5)
            prune.random_unstructured(module, "weight_ih_l0", 0.5)
        rkm.load_state_dict(lstm.state_dict())
        assert_same_function(rkm, lstm)


@pytest.mark.parametrize("change", ["weight norm", "spectral norm", "old weight norm", "old spectral norm"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_normalised_lstm_s_weights_are_refused_and_an_rkm_s_are_loaded(change, bias):
    lstm, rkm, other = nn.LSTM(3, 5, bias=bias), *(RKM(3, 5, cell="lstm", bias=bias) for _ in range(2))
    for module in (lstm, rkm, other):
        for name in ("weight_hh_l0", "weight_ih_l0"):
            CHANGES[change](module, name)
    for state_dict in (lstm.state_dict(), through_a_file(lstm.state_dict()), bare(lstm.state_dict())):
        with pytest.raises(RKMError, match=r"take RKM\.from_lstm"):
            rkm.load_state_dict(state_dict)
    for take in (through_a_file, bare):
        rkm.load_state_dict(take(other.state_dict()))
        x = torch.randn(4, 2, 3)
        assert_close(rkm.eval()(x)[0], other.eval()(x)[0])


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_a_wrapped_model_are_converted(bias):
    """``DataParallel`` and ``DistributedDataParallel`` put ``module.`` before all names."""
    lstm, rkm = Model(nn.LSTM(3, 5, bias=bias)), Model(RKM(3, 5, cell="lstm", bias=bias))
    nn.DataParallel(rkm).load_state_dict(nn.DataParallel(lstm).state_dict())
    assert_same_function(rkm.rnn, lstm.rnn)


def test_weights_that_are_computed_count_and_run_under_autocast():
    for change, apply in CHANGES.items():
        rkm = changed(RKM(3, 5, 2, bidirectional=True), change)
        assert rkm.num_weights() == RKM(3, 5, 2, bidirectional=True).num_weights()
        apply(rkm, "weight_ih_l0")
        with torch.autocast("cpu"):
            assert rkm(torch.randn(4, 2, 3))[0].dtype == torch.bfloat16
