from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICES

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import BACKENDS, Weights, dispatch
from fairseq_rkm.ops.ngram import is_empty

SIZES = {"inputs": torch.zeros(2, 1, 3), "weights": Weights(torch.zeros(16, 3), torch.zeros(16, 4))}


def test_auto_takes_the_first_that_takes_the_problem_and_never_the_reference(monkeypatch):
    refusing = dispatch.Backend(lambda *_: None, refuses=lambda *_: "it is Monday")
    monkeypatch.setattr(dispatch, "BACKENDS", {"picky": refusing, **BACKENDS})
    assert dispatch.pick("auto", CELLS["lstm"], **SIZES) is not refusing
    assert not BACKENDS["reference"].automatic
    with pytest.raises(RKMError, match="backend 'picky' cannot run this: it is Monday"):
        dispatch.pick("picky", CELLS["lstm"], **SIZES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("feedback", [None, False])
@pytest.mark.parametrize("ngram", [1, 3])
def test_without_a_step_the_state_stays(device, cell, feedback, ngram):
    """An n-gram's inputs before the first step are no steps."""
    rnn = RKM(2, 4, cell=cell, feedback=feedback, ngram=ngram, device=device, dtype=torch.float64)
    output, state = rnn(torch.randn(5, 3, 2, device=device, dtype=torch.float64))
    torch.full((1000,), torch.nan, device=device, dtype=torch.float64)  # its memory is given out again
    output, after = rnn(torch.zeros(0, 3, 2, device=device, dtype=torch.float64), state)
    assert output.shape == (0, 3, 4)
    for before, now in zip(state, after, strict=True):
        assert torch.equal(before, now)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 0), (1, 5, 2, 3), ()])
@pytest.mark.parametrize("plain", [True, False])
def test_inputs_of_another_shape_are_refused_in_a_sentence(monkeypatch, shape, plain):
    if not plain:
        monkeypatch.setattr(dispatch, "are_plain", lambda *_: False)
    with pytest.raises(RKMError, match=r"must be of shape \(T \+ n - 1, B, m\), with m of at least 1, and not \("):
        dispatch.recurrence(CELLS["rkm_lstm"], torch.zeros(shape), SIZES["weights"], 4, None, None)


@pytest.mark.parametrize("name", ["native", "scan", "persistent", "blockwise", "stepwise"])
def test_inputs_before_the_first_step_are_no_steps(name):
    context, weights = torch.zeros(1, 1, 3), Weights(torch.zeros(16, 6), torch.zeros(16, 4))
    for inputs in (context, context[:0], context[:, :0]):
        assert is_empty(inputs, weights.input)
        assert BACKENDS[name].refuses(CELLS["rkm_lstm"], inputs, weights)
    assert not is_empty(torch.zeros(2, 1, 3), weights.input)


def test_an_unknown_backend_is_refused_when_the_module_is_built():
    with pytest.raises(RKMError, match="unknown backend 'gpu'; choose one of auto"):
        RKM(2, 2, backend="gpu")


def test_mixed_dtypes_and_devices_are_refused():
    with pytest.raises(RKMError, match=r"torch\.float64 but the weights torch\.float32"):
        RKM(2, 2)(torch.zeros(1, 1, 2, dtype=torch.float64))
    rnn = RKM(2, 2)
    rnn.bias_l0.data = rnn.bias_l0.data.double()
    with pytest.raises(RKMError, match=r"torch\.float32 but the biases torch\.float64"):
        rnn(torch.zeros(1, 1, 2))
    with pytest.raises(RKMError, match="inputs are on meta but the weights on cpu"):
        RKM(2, 2)(torch.zeros(1, 1, 2, device="meta"))


def watch(monkeypatch, name):
    """The calls of a function of ``dispatch``, while nothing is remembered from before."""
    calls, function = [], getattr(dispatch, name)
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    monkeypatch.setattr(dispatch, "MOST_PROVEN", 40)
    monkeypatch.setattr(dispatch, name, lambda *problem: calls.append(problem) or function(*problem))
    return calls


def problem(cell="rkm_lstm", steps=2, batch=3, size=4, features=3, dtype=torch.float32, backend="auto", **others):
    """The arguments of ``recurrence``; ``others``: state, mask, and the weights' optional fields."""
    cell, wide = CELLS[cell] if isinstance(cell, str) else cell, torch.promote_types(dtype, torch.float32)
    recurrent = torch.zeros(len(cell.recurrent_gates) * size, size, dtype=dtype) if cell.has_feedback else None
    weights = Weights(torch.zeros(len(cell.gates) * size, features, dtype=dtype), recurrent)
    if others.pop("norm", False):
        weights = weights._replace(norm_weight=torch.ones(size, dtype=wide), norm_bias=torch.zeros(size, dtype=wide))
    weights = weights._replace(**{name: others.pop(name) for name in Weights._fields if name in others})
    given = {"hidden": None, "memory": None, "keep": None, **others}
    return cell, torch.zeros(steps, batch, features, dtype=dtype), weights, size, *given.values(), backend


def test_checks_and_choices_are_remembered_for_all_that_they_depend_on(monkeypatch):
    asked = watch(monkeypatch, "pick")
    keep = torch.ones(2, 3, dtype=torch.bool)
    problems = [
        problem(), problem(batch=4), problem(steps=1), problem(steps=0), problem(size=5), problem(features=2),
        problem(dtype=torch.float64), problem("lstm"), problem(CELLS["rkm_lstm"].clipped(1)), problem(norm=True),
        problem(CELLS["rkm_lstm"].without_feedback()), problem(keep=keep), problem(backend="batched"),
        problem(memory=torch.zeros(3, 4).double()), problem("linear_kernel", sigma_f=torch.zeros(4)),
        problem("linear_kernel", sigma_f=0.3),
    ]  # fmt: skip
    first = [dispatch.recurrence(*each) for each in problems]
    assert len(asked) == len(problems)
    again = [dispatch.recurrence(*each) for each in problems]
    assert len(asked) == len(problems)
    for results in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    of_no_matter = (
        problem(steps=7), problem(bias=torch.zeros(16)), problem(hidden=torch.zeros(3, 4)),
        problem(memory=torch.zeros(3, 4)), problem("linear_kernel", sigma_i=0.3),
    )  # fmt: skip
    for each in of_no_matter:
        dispatch.recurrence(*each)
    assert len(asked) == len(problems)
    for batch in range(100, 180):
        dispatch.recurrence(*problem(batch=batch))
    assert len(dispatch._PROVEN) <= 40


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"bias": torch.zeros(15)}, "biases must be of shape"),
        ({"bias": torch.zeros(16).double()}, r"torch\.float32 but the biases torch\.float64"),
        ({"recurrent": torch.zeros(16, 5)}, "recurrent weights must be of shape"),
        ({"hidden": torch.zeros(2, 4)}, "hidden state must be of shape"),
        ({"memory": torch.zeros(3, 4, dtype=torch.int64)}, "memory must be floating-point"),
        ({"keep": torch.ones(3, 3, dtype=torch.bool)}, "mask must be of shape"),
        ({"keep": torch.ones(2, 3)}, "but the mask torch.float32"),
        ({"size": 5, "recurrent": torch.zeros(16, 4)}, "recurrent weights must be of shape"),
        ({"backend": "gpu"}, "unknown backend"),
        ({"backend": ["auto"]}, "unknown backend"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_after_what_does(others, message, monkeypatch):
    asked = watch(monkeypatch, "check")
    fitting = {"bias": torch.zeros(16), "hidden": torch.zeros(3, 4)}
    keep = {"keep": torch.ones(2, 3, dtype=torch.bool)}
    for more in ({}, keep):
        for _ in range(2):
            dispatch.recurrence(*problem(**fitting, **more))
            with pytest.raises(RKMError, match=message):
                dispatch.recurrence(*problem(**{**fitting, **more, **others}))
    # Without a mask it is seen at once whether tensors fit.
    assert len(asked) == 1 + 2 * 2 - 2 * ("backend" in others)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"sigma_i": torch.zeros(4)}, r"input's scale sigma_i must be of shape \(\) here, not \(4,\)"),
        ({"sigma_f": torch.zeros(3, 4)}, r"memory's scale sigma_f must be of shape \(4,\) here, not \(3, 4\)"),
        ({"sigma_f": torch.zeros(4, dtype=torch.int64)}, "memory's scale sigma_f must be floating-point"),
    ],
    ids=str,
)
def test_constant_scales_of_another_shape_are_refused_by_cells_that_read_them(scale, message):
    dispatch.recurrence(*problem("linear_kernel", sigma_i=torch.tensor(0.5), sigma_f=torch.zeros(4)))
    with pytest.raises(RKMError, match=message):
        dispatch.recurrence(*problem("linear_kernel", **scale))
    dispatch.recurrence(*problem(**scale))  # rkm_lstm has gates in their places


def test_tf32_is_another_choice_on_gpus(monkeypatch):
    cell, x, weights, *_ = problem()
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    monkeypatch.setattr(dispatch, "pick", lambda *_: dispatch.BACKENDS["batched"])
    on_gpu = SimpleNamespace(is_cuda=True, shape=x.shape, dtype=x.dtype, device=torch.device("cuda", 0))
    kinds = set()
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        for device in ("cuda:0", "cuda:1"):
            on_gpu.device = torch.device(device)
            kinds.add(dispatch._kind("auto", cell, on_gpu, weights, 4, None, None, None))
            for _ in range(2):
                dispatch.picked("auto", cell, on_gpu, weights)
    assert len(kinds) == len(dispatch._PROVEN) == 4


@pytest.mark.parametrize("backend", ["batched", "auto", "reference"])
@pytest.mark.parametrize("cell", ["rkm_lstm", "rkm_cifg", "gated_cnn", "linear_kernel"])
def test_a_scale_that_the_cell_does_not_read_has_no_gradient(cell, backend):
    scales = {"sigma_i": torch.tensor(0.3, requires_grad=True), "sigma_f": torch.full((4,), 0.7, requires_grad=True)}
    given = problem(cell, steps=3, backend=backend, memory=torch.randn(3, 4), **scales)
    for tensor in (given[1], given[2].input):
        tensor.normal_()
    output, _, _ = dispatch.recurrence(*given)
    grads = torch.autograd.grad(output.sum() + 0 * sum(s.sum() for s in scales.values()), list(scales.values()))
    read = CELLS[cell].input_is_constant, CELLS[cell].forget_is_constant
    assert [bool(grad.any()) for grad in grads] == list(read)
