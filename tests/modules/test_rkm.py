import copy
import itertools
from pydoc_data.topics import topics

import pytest
import torch
from helpers import assert_close, random_mask, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_rkm import CELLS, RKM, RKMError, RKMState
from fairseq_rkm.modules import plain_calls
from fairseq_rkm.modules import rkm as rkm_module
from fairseq_rkm.ops import BACKENDS

DOUBLE = torch.float64
CPU_BACKENDS = [name for name in BACKENDS if name not in {"native", "persistent", "blockwise", "stepwise", "scan"}]


def test_parameters_have_the_contract_s_names_and_shapes():
    rkm = RKM(3, 5, num_layers=2, cell="ran", ngram=2, layer_norm=True, bidirectional=True)
    shapes = {name: tuple(p.shape) for name, p in rkm.named_parameters()}
    assert rkm.gates == ("candidate", "input", "forget")
    assert rkm.recurrent_gates == ("input", "forget")
    expected = {}
    for layer, m in ((0, 3), (1, 10)):
        for suffix in ("", "_reverse"):
            at = f"l{layer}{suffix}"
            expected |= {f"weight_ih_{at}": (15, 2 * m), f"weight_hh_{at}": (10, 5), f"bias_{at}": (15,)}
            expected |= {f"norm_weight_{at}": (5,), f"norm_bias_{at}": (5,)}
    assert shapes == expected
    learned = RKM(3, 5, cell="linear_kernel", learn_sigma=True, bias=False, feedback=False)
    names = {name: tuple(p.shape) for name, p in learned.named_parameters()}
    assert names == {"weight_ih_l0": (5, 3), "sigma_i_logit_l0": (), "sigma_f_logit_l0": (5,)}


def test_initial_values():
    rkm = RKM(3, 4, cell="rkm_cifg", layer_norm=True, forget_bias=2.5)
    assert rkm.bias_l0.chunk(3)[rkm.gates.index("forget")].eq(2.5).all()
    assert rkm.norm_weight_l0.eq(1).all()
    assert rkm.norm_bias_l0.eq(0).all()
    assert rkm.weight_hh_l0.abs().max() <= 0.5
    learned = RKM(3, 4, cell="linear_kernel", learn_sigma=True)
    assert learned.sigma_i_logit_l0.item() == 0
    assert learned.sigma_f_logit_l0.eq(0).all()
    torch.testing.assert_close(
        RKM(3, 4, cell="cnn", learn_sigma=True, sigma_i2=0.2).sigma_i_logit_l0.sigmoid().item(), 0.2
    )


def test_learned_sigmas_start_as_the_fixed_ones():
    fixed = RKM(3, 4, cell="linear_kernel_gated", sigma_i2=0.3, sigma_f2=0.8)
    learned = RKM(3, 4, cell="linear_kernel_gated", sigma_i2=0.3, sigma_f2=0.8, learn_sigma=True)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    x = torch.randn(6, 2, 3)
    assert_close(learned(x)[0], fixed(x)[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "bias"),
    [(1, False, False, True), (3, True, True, True), (2, True, False, False)],
)
def test_from_lstm_and_back_are_the_same_function(backend, layers, bidirectional, batch_first, bias):
    lstm = nn.LSTM(3, 5, layers, bias, batch_first, bidirectional=bidirectional, dtype=DOUBLE)
    rkm = RKM.from_lstm(lstm)
    rkm.backend = backend
    x = torch.randn(4, 6, 3, dtype=DOUBLE, requires_grad=True)
    batch = 4 if batch_first else 6
    state = torch.randn(2, layers * (1 + bidirectional), batch, 5, dtype=DOUBLE)
    expected, (hidden, memory) = lstm(x, (state[0], state[1]))
    for module in (rkm, RKM.from_lstm(rkm.to_lstm())):
        output, final = module(x, RKMState(state[0], state[1]))
        assert_close(output, expected)
        assert_close(final.hidden, hidden)
        assert_close(final.cell, memory)
    (wanted,) = torch.autograd.grad(expected.pow(2).sum(), x)
    (given_,) = torch.autograd.grad(rkm(x, (state[0], state[1]))[0].pow(2).sum(), x)
    assert_close(given_, wanted)


def test_conversions_that_cannot_be_are_refused():
    for arguments in (
        {"cell": "rkm_lstm"},
        {"ngram": 2},
        {"feedback": False},
        {"layer_norm": True},
        {"memory_clip": 1.0},
    ):
        with pytest.raises(RKMError, match=r"is an nn\.LSTM"):
            RKM(3, 5, **{"cell": "lstm", **arguments}).to_lstm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": "gru"}, "unknown cell 'gru'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'"),
        ({"ngram": 0}, "ngram must be at least 1, not 0"),
        ({"ngram": 2, "ngram_padding": "same"}, "centres an odd window; ngram is 2"),
        ({"ngram_padding": "valid"}, "unknown ngram_padding 'valid'"),
        ({"sigma_i2": 0.0}, r"sigma_i2 must lie within \(0, 1\), not be 0.0"),
        ({"sigma_f2": 1.0}, r"sigma_f2 must lie within \(0, 1\), not be 1.0"),
        ({"cell": "cnn", "feedback": True}, "'cnn' has no feedback"),
        ({"dropout": 1.0}, r"dropout must lie within \[0, 1\)"),
        ({"weight_dropout": -0.1}, r"weight_dropout must lie within \[0, 1\)"),
        ({"memory_clip": 0.0}, "memory_clip must be 'auto', 'none' \\(None\\) or a number above 0 and finite, not 0.0"),
        ({"memory_clip": float("inf")}, "number above 0 and finite, not inf"),
        ({"memory_clip": float("nan")}, "number above 0 and finite, not nan"),
        ({"memory_clip": -1}, "number above 0 and finite, not -1"),
        ({"memory_clip": "-1"}, "number above 0 and finite, not '-1'"),
        ({"memory_clip": "1e400"}, "number above 0 and finite, not '1e400'"),
        ({"memory_clip": "automatic"}, "number above 0 and finite, not 'automatic'"),
        ({"memory_clip": ""}, "number above 0 and finite, not ''"),
        ({"memory_clip": True}, "number above 0 and finite, not True"),
        ({"memory_clip": [1]}, r"number above 0 and finite, not \[1\]"),
        ({"memory_clip": "2", "layer_norm": True}, "memory_clip and layer_norm both bound the memory: choose one"),
        ({"memory_clip": 1.0, "layer_norm": True}, "memory_clip and layer_norm both bound the memory: choose one"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, message):
    with pytest.raises(RKMError, match=message):
        RKM(**{"input_size": 3, "hidden_size": 4, **arguments})


@pytest.mark.parametrize("cell", CELLS)
def test_auto_bounds_what_is_fed_back_unbounded_and_nothing_else(cell):
    """By the definition: whether a large memory, with all else at zero, makes ``h`` and so what is fed back large."""
    rkm = RKM(2, 3, cell=cell, forget_bias=30.0, memory_clip=None)
    large = torch.full((1, 1, 3), 1e6)
    fed_back = rkm.feedback and rkm(torch.zeros(1, 1, 2), (0 * large, large))[0].abs().max() > 1e3
    assert RKM(2, 3, cell=cell).memory_clip == (1.0 if fed_back else None)
    assert RKM(2, 3, cell=cell, feedback=False).memory_clip is None
    assert RKM(2, 3, cell=cell, layer_norm=True).memory_clip is None


def test_the_bound_shows_where_it_is_in_force_or_given_up():
    assert "memory_clip=1.0" in repr(RKM(2, 3))
    assert "memory_clip=None" in repr(RKM(2, 3, memory_clip=None))
    assert "memory_clip" not in repr(RKM(2, 3, cell="lstm"))
    assert RKM(2, 3, 1, "rkm_lstm", 1, "causal", None, True, False, "2").memory_clip == 2.0
    assert copy.deepcopy(RKM(2, 3)).memory_clip == 1.0
    assert RKM.from_lstm(nn.LSTM(2, 3)).memory_clip is None


def test_a_character_model_learns_as_an_lstm_s_does():
    """Adam at 3e-3 on the interpreter's own text: without the bound its loss is 5e8 by then."""
    text = "".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor([min(ord(letter), 127) for letter in text[:100_000]]).view(16, -1)

    def last_losses(recurrence):
        torch.manual_seed(1)
        embedding, softmax = nn.Embedding(128, 64), nn.Linear(128, 128)
        module = recurrence(64, 128)
        parameters = [*embedding.parameters(), *module.parameters(), *softmax.parameters()]
        optimizer, losses = torch.optim.Adam(parameters, lr=3e-3), []
        for update in range(150):
            piece = tokens[:, update * 20 : update * 20 + 21].t()
            logits = softmax(module(embedding(piece[:-1]))[0])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), piece[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-20:]) / 20

    assert last_losses(RKM) < 1.1 * last_losses(nn.LSTM)


def test_inputs_that_do_not_fit_are_refused_in_a_sentence():
    rkm = RKM(3, 4, num_layers=2, ngram=3)
    x = torch.zeros(5, 2, 3)
    _, state = rkm(x)
    with pytest.raises(RKMError, match=r"must be a tensor \(T, B, m\) with m = 3, not \(5, 2, 4\)"):
        rkm(torch.zeros(5, 2, 4))
    for shapeless in (torch.zeros(()), torch.zeros(3), torch.zeros(1, 5, 2, 3), [x], None):
        with pytest.raises(RKMError, match="one sequence alone is"):
            rkm(shapeless)
    with pytest.raises(RKMError, match=r"padding_mask must be bool of shape \(B, T\) = \(2, 5\).*\(5, 2\)"):
        rkm(x, padding_mask=torch.zeros(5, 2, dtype=torch.bool))
    with pytest.raises(RKMError, match=r"state's hidden must have shape .* = \(2, 3, 4\), not \(2, 2, 4\)"):
        rkm(torch.zeros(5, 3, 3), state)
    with pytest.raises(RKMError, match="state's context must be one tensor a layer"):
        rkm(x, state._replace(context=state.context[:1]))
    with pytest.raises(RKMError, match="state's context must be None for ngram 1"):
        RKM(3, 4, num_layers=2)(x, state)


def test_states_that_might_be_misread_are_refused_in_a_sentence():
    rkm, x = RKM(3, 4, num_layers=2), torch.zeros(5, 2, 3)
    pair = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    for state, message in (
        (pair[0], "an RKMState or a pair .* not Tensor"),
        (torch.stack(pair), "an RKMState or a pair .* not Tensor"),
        ({"hidden": pair[0], "cell": pair[1]}, "an RKMState or a pair .* not dict"),
        ((pair[0],), "an RKMState or a pair .* not 1 of them"),
        ([pair, pair], "state's hidden must be one tensor .* not a tuple"),
        ((pair[0], None), "state's cell must be one tensor .* not a NoneType"),
        ((pair[0], pair[1][:, :1]), r"state's cell must have shape .* not \(2, 1, 4\)"),
        ((pair[0][:1], pair[1]), r"state's hidden must have shape .* not \(1, 2, 4\)"),
        ((pair[0].int(), pair[1]), r"the hidden state must be floating-point numbers, not torch\.int32"),
        ((pair[0], pair[1].cfloat()), r"the memory must be floating-point numbers, not torch\.complex64"),
        ((pair[0], pair[1].to("meta")), "inputs are on cpu but the memory on meta"),
    ):
        with pytest.raises(RKMError, match=message):
            rkm(x, state)
    grams = RKM(3, 4, ngram=2)
    state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    context = torch.zeros(1, 2, 3)
    for given_, message in (
        (context, "context must be a list of tensors, not Tensor"),
        ([context.int()], r"floating-point numbers on cpu, not torch\.int32 on cpu"),
        ([context.to("meta")], r"floating-point numbers on cpu, not torch\.float32 on meta"),
    ):
        with pytest.raises(RKMError, match=message):
            grams(x, (*state, given_))
    assert torch.equal(grams(x, state)[0], grams(x, RKMState(*state, [context]))[0]), "a pair has an empty context"


def test_a_state_of_another_floating_point_type_is_converted():
    rkm = randomized(RKM(3, 4))
    x, hidden, memory = torch.randn(5, 2, 3), *torch.randn(2, 1, 2, 4)
    output, state = rkm(x, (hidden.double(), memory.double()))
    assert torch.equal(output, rkm(x, (hidden, memory))[0])
    assert (state.hidden.dtype, state.cell.dtype) == (torch.float32, torch.float32)


def test_masks_and_numbers_of_another_kind_are_refused_in_a_sentence():
    rkm, x, mask = RKM(3, 4), torch.zeros(5, 2, 3), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(RKMError, match="padding_mask must be a tensor on cpu, as the input is, not a tensor on meta"):
        rkm(x, padding_mask=mask.to("meta"))
    with pytest.raises(RKMError, match="padding_mask must be a tensor on cpu, as the input is, not list"):
        rkm(x, padding_mask=mask.tolist())
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(RKMError, match=f"inputs are {dtype} but the weights torch.float32"):
            rkm(x.to(dtype))
    with pytest.raises(RKMError, match=r"the inputs must be floating-point numbers, not torch\.complex64"):
        RKM(3, 4, dtype=torch.complex64, cell="cnn")(x.cfloat())


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_l0", "norm_weight_l0", "norm_bias_l0"])
def test_weights_of_another_shape_or_device_are_refused_where_they_would_be_broadcast_or_read_past(name):
    rkm, x = RKM(3, 4, layer_norm=True), torch.zeros(5, 2, 3)
    parameter = rkm.get_parameter(name)
    for value in (parameter[:1], torch.cat([parameter, parameter])):
        with pytest.raises(RKMError, match=r"must be of shape \(\d+,( \d+)?\) here, not"):
            torch.func.functional_call(rkm, {name: value}, (x,))
    with pytest.raises(RKMError, match=r"the inputs are on cpu but the .* on meta"):
        torch.func.functional_call(rkm, {name: parameter.to("meta")}, (x,))


def test_autocast_leaves_float64_as_it_is():
    rkm, x = RKM(3, 4, dtype=DOUBLE), torch.randn(5, 2, 3, dtype=DOUBLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = rkm(x)
    assert torch.equal(output, rkm(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models_keep_their_memory_in_float32(dtype):
    output, state = RKM(3, 4, dtype=dtype)(torch.randn(5, 2, 3, dtype=dtype))
    assert (output.dtype, state.hidden.dtype, state.cell.dtype) == (dtype, dtype, torch.float32)


def test_autocast_computes_in_its_dtype_and_trains_the_float32_weights():
    rkm = RKM(8, 8, num_layers=2, cell="lstm", layer_norm=True)
    x = torch.randn(5, 3, 8)
    expected, _ = rkm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = rkm(x)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected)
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in rkm.parameters())


def test_locked_dropout_between_layers_and_none_behind_the_last():
    rkm = RKM(3, 50, num_layers=2, cell="cnn", dropout=0.5)
    first = RKM(3, 50, cell="cnn")
    first.load_state_dict({n: p for n, p in rkm.state_dict().items() if n.endswith("l0")})
    seen = []
    rkm.dropout.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    output, _ = rkm(torch.randn(7, 2, 3))
    ((before, after),) = seen
    kept = after.ne(0)
    assert (kept == kept[:1]).all(), "one mask for all steps"
    assert 0.2 < kept[0].float().mean() < 0.8
    torch.testing.assert_close(after[kept], 2 * before[kept])
    assert output.ne(0).all()
    assert torch.equal(*(rkm.eval()(torch.ones(7, 2, 3))[0] for _ in range(2)))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_weight_dropout_reaches_the_recurrent_weights_and_these_alone(backend, monkeypatch):
    rkm = RKM(3, 20, weight_dropout=0.5, backend=backend)
    used = []
    run = rkm_module.recurrence
    for way in (rkm_module, plain_calls):
        monkeypatch.setattr(way, "recurrence", lambda *args: used.append(args[2]) or run(*args))
    rkm(torch.randn(9, 2, 3))[0].sum().backward()
    (weights,) = used
    dropped = weights.recurrent.eq(0)
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(weights.recurrent[~dropped], 2 * rkm.weight_hh_l0[~dropped])
    assert torch.equal(weights.input, rkm.weight_ih_l0)
    assert rkm.weight_hh_l0.grad[~dropped].ne(0).all(), "the raw weights must train"
    assert rkm.weight_hh_l0.grad[dropped].eq(0).all()
    rkm.eval()(torch.randn(1, 1, 3))
    assert torch.equal(used[-1].recurrent, rkm.weight_hh_l0)


@pytest.mark.parametrize("arguments", [{"cell": "rkm_lstm", "feedback": False}, {"cell": "gated_cnn"}])
def test_without_feedback_weight_dropout_reaches_the_inputs_weights(arguments, monkeypatch):
    rkm = RKM(20, 3, weight_dropout=0.5, **arguments)
    used = []
    run = rkm_module.recurrence
    for way in (rkm_module, plain_calls):
        monkeypatch.setattr(way, "recurrence", lambda *args: used.append(args[2]) or run(*args))
    for _ in range(2):
        rkm(torch.randn(9, 2, 20))
    dropped = used[0].input.eq(0)
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(used[0].input[~dropped], 2 * rkm.weight_ih_l0[~dropped])
    assert not torch.equal(used[0].input, used[1].input), "a mask for each pass"
    rkm.eval()(torch.randn(1, 1, 20))
    assert torch.equal(used[-1].input, rkm.weight_ih_l0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_state_dropout_drops_units_of_the_state_as_gates_read_them(backend):
    """Against a loop of PyTorch's cell, given a state whose dropped units are zero."""
    lstm = torch.nn.LSTM(3, 20)
    rkm, cell = RKM(3, 20, cell="lstm", state_dropout=0.5, backend=backend), torch.nn.LSTMCell(3, 20)
    rkm.load_state_dict(RKM.from_lstm(lstm).state_dict())
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x, kept = torch.randn(9, 2, 3), None
    for _ in range(2):
        start = torch.get_rng_state()
        output, (hidden, memory) = rkm(x)
        torch.set_rng_state(start)
        mask = torch.nn.functional.dropout(torch.ones(20), 0.5)
        assert 0 < mask.eq(0).sum() < 20
        assert kept is None or not torch.equal(mask, kept), "a mask for each pass"
        h, c, kept = torch.zeros(2, 20), torch.zeros(2, 20), mask
        for step, result in zip(x, output, strict=True):
            h, c = cell(step, (h * mask, c))
            assert_close(result, h)
        assert_close(hidden[0], h)
        assert_close(memory[0], c)
    output.sum().backward()
    assert torch.equal(rkm.weight_hh_l0.grad.eq(0).all(0), mask.eq(0)), "the weights of kept units train"
    assert_close(rkm.eval()(x)[0], lstm(x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state_dropout": 1.0}, r"state_dropout must lie within \[0, 1\)"),
        ({"state_dropout": 0.1, "feedback": False}, "without feedback nothing reads it"),
        ({"state_dropout": 0.1, "cell": "cnn"}, "without feedback nothing reads it"),
        ({"state_dropout": 0.1, "kernel": "gaussian"}, "the gaussian kernel does more than multiply"),
    ],
)
def test_state_dropout_is_refused_where_no_product_reads_the_state(arguments, message):
    with pytest.raises(RKMError, match=message):
        RKM(3, 4, **arguments)
    RKM(3, 4, **{**arguments, "state_dropout": 0.0})
    assert RKM(3, 4, cell="ran", kernel="gaussian", state_dropout=0.1)(torch.randn(2, 1, 3))[0].shape == (2, 1, 4)


def test_same_padding_and_backward_windows():
    """A cell that passes its newest, middle and oldest input through: what each window holds."""
    x = torch.arange(1.0, 6.0).view(5, 1, 1)
    for padding, bidirectional, expected in (
        ("causal", False, [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3]]),
        ("same", False, [[2, 1, 0], [3, 2, 1], [4, 3, 2], [5, 4, 3], [0, 5, 4]]),
        ("causal", True, [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 0], [5, 0, 0]]),
        ("same", True, [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 0]]),
    ):
        rkm = RKM(1, 3, cell="cnn", ngram=3, ngram_padding=padding, bidirectional=bidirectional, bias=False)
        with torch.no_grad():
            for name, weight in rkm.named_parameters():
                weight.copy_(0.02 * torch.eye(3))
                assert name.startswith("weight_ih")
        output = rkm(x)[0][:, 0, -3:]
        torch.testing.assert_close(output.atanh() * 100, torch.tensor(expected, dtype=torch.float32))


variants = st.fixed_dictionaries({
    "cell": st.sampled_from(list(CELLS)),
    "backend": st.sampled_from(CPU_BACKENDS),
    "ngram": st.integers(1, 4),
    "layer_norm": st.booleans(),
    "num_layers": st.integers(1, 2),
    "feedback": st.sampled_from([None, False]),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(variants, st.integers(0, 6), st.integers(0, 6))
def test_a_sequence_cut_anywhere_is_the_sequence_whole(arguments, first, second):
    rkm = randomized(RKM(2, 3, dtype=DOUBLE, **arguments))
    x = torch.randn(6, 2, 2, dtype=DOUBLE)
    whole, end = rkm(x)
    state, parts = None, []
    for part in (x[: min(first, second)], x[min(first, second) : max(first, second)], x[max(first, second) :]):
        output, state = rkm(part, state)
        parts.append(output)
    assert_close(torch.cat(parts), whole)
    assert_close(state.cell, end.cell)
    for given_, wanted in zip(state.context or [], end.context or [], strict=True):
        assert_close(given_, wanted)


@settings(max_examples=60, deadline=None)
@given(variants, st.booleans(), st.sampled_from(["causal", "same"]), st.integers(0, 3), st.integers(0, 3))
def test_padding_on_either_side_changes_nothing(arguments, bidirectional, padding, left, right):
    arguments = {**arguments, "ngram": arguments["ngram"] | 1, "ngram_padding": padding}
    rkm = randomized(RKM(2, 3, dtype=DOUBLE, bidirectional=bidirectional, **arguments))
    x = torch.randn(4, 2, 2, dtype=DOUBLE)
    # Row 1 is padded, with NaN that must not show; row 0 is longer, so that the batch is a true mixture.
    longer = torch.randn(left + 4 + right, 1, 2, dtype=DOUBLE)
    padded = torch.full((left + 4 + right, 1, 2), torch.nan, dtype=DOUBLE)
    padded[left : left + 4] = x[:, 1:]
    mask = torch.zeros(2, left + 4 + right, dtype=torch.bool)
    mask[1, :left] = mask[1, left + 4 :] = True
    output, state = rkm(torch.cat([longer, padded], dim=1), padding_mask=mask)
    expected, end = rkm(x[:, 1:])
    assert_close(output[left : left + 4, 1:], expected)
    assert output[:left, 1].eq(0).all()
    assert output[left + 4 :, 1].eq(0).all()
    assert_close(state.hidden[:, 1:], end.hidden)
    assert_close(state.cell[:, 1:], end.cell)
    for given_, wanted in zip(state.context or [], end.context or [], strict=True):
        assert_close(given_[:, 1:], wanted)
    alone, _ = rkm(longer)
    assert_close(output[:, :1], alone)


@settings(max_examples=40, deadline=None)
@given(variants, st.permutations(range(4)))
def test_the_order_of_a_batch_does_not_matter(arguments, order):
    rkm = randomized(RKM(2, 3, dtype=DOUBLE, **arguments))
    x, mask = torch.randn(5, 4, 2, dtype=DOUBLE), random_mask("mixed", 4, 5)
    output, state = rkm(x, padding_mask=mask)
    rows = torch.tensor(order)
    shuffled, shuffled_state = rkm(x[:, rows], padding_mask=mask[rows])
    assert_close(shuffled, output[:, rows])
    assert_close(shuffled_state.cell, state.index_select(rows).cell)


def test_batch_first_is_a_transposition():
    rkm = RKM(2, 3, num_layers=2, ngram=2)
    x = torch.randn(5, 4, 2)
    output, state = rkm(x)
    rkm.batch_first = True
    transposed, same_state = rkm(x.transpose(0, 1))
    assert torch.equal(transposed, output.transpose(0, 1))
    assert torch.equal(same_state.hidden, state.hidden)


def test_non_contiguous_inputs_are_fine():
    rkm = RKM(4, 3)
    x = torch.randn(4, 5, 2).permute(1, 2, 0)
    assert torch.equal(rkm(x)[0], rkm(x.contiguous())[0])


@pytest.mark.parametrize(("cell", "feedback"), itertools.product(CELLS, (None, False)))
def test_description_names_what_was_chosen(cell, feedback):
    text = repr(RKM(3, 4, cell=cell, feedback=feedback, ngram=3))
    assert f"cell='{cell}', ngram=3" in text
    assert ("feedback=False" in text) == (feedback is False or not CELLS[cell].has_feedback)


@pytest.mark.parametrize("cell", CELLS)
def test_the_rows_of_a_gate_are_named(cell):
    """Setting the bias of a gate acts on this gate: an open forget gate keeps the memory, a closed output is zero."""
    rkm = RKM(2, 3, 2, cell=cell, bidirectional=True, forget_bias=None, memory_clip=None)
    assert [rkm.gate_slice(gate) for gate in rkm.gates] == [slice(3 * i, 3 * i + 3) for i in range(len(rkm.gates))]
    recurrent = [rkm.gate_slice(gate, recurrent=True) for gate in rkm.recurrent_gates]
    assert recurrent == [slice(3 * i, 3 * i + 3) for i in range(len(rkm.recurrent_gates))]
    for gate in {"candidate", "input", "forget", "output"} - set(rkm.gates):
        with pytest.raises(RKMError, match=f"'{cell}' has no rows of a gate '{gate}' here: the gates in its weight_ih"):
            rkm.gate_slice(gate)
    for gate in {"candidate", "input", "forget", "output"} - set(rkm.recurrent_gates):
        with pytest.raises(RKMError, match=r"the gates in its weight_hh are|nothing is fed back"):
            rkm.gate_slice(gate, recurrent=True)
    memory = torch.rand(4, 5, 3)
    with torch.no_grad():
        for name, bias in rkm.named_parameters():
            if name.startswith("bias") and "forget" in rkm.gates:
                bias[rkm.gate_slice("forget")] = 50
            if name.startswith("bias") and "input" in rkm.gates:
                bias[rkm.gate_slice("input")] = -50
            if name.startswith("bias") and "output" in rkm.gates:
                bias[rkm.gate_slice("output")] = -50
    output, state = rkm(torch.randn(4, 5, 2), (torch.zeros(4, 5, 3), memory))
    if "forget" in rkm.gates:
        assert_close(state.cell, memory)
    if "output" in rkm.gates:
        assert output.abs().max() < 1e-12
