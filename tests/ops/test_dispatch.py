from types import SimpleNamespace

import pytest
import torch

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.ops import BACKENDS, Weights, dispatch

SIZES = {"inputs": torch.zeros(2, 1, 3), "weights": Weights(torch.zeros(16, 3), torch.zeros(16, 4))}


def test_auto_takes_the_first_that_takes_the_problem_and_never_the_reference(monkeypatch):
    refusing = dispatch.Backend(lambda *_: None, refuses=lambda *_: "it is Monday")
    monkeypatch.setattr(dispatch, "BACKENDS", {"picky": refusing, **BACKENDS})
    assert dispatch.pick("auto", CELLS["lstm"], **SIZES) is not refusing
    assert not BACKENDS["reference"].automatic
    with pytest.raises(RKMError, match="backend 'picky' cannot run this: it is Monday"):
        dispatch.pick("picky", CELLS["lstm"], **SIZES)


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


def test_choices_on_gpus_are_remembered_for_all_that_they_depend_on(monkeypatch):
    """With stand-ins for tensors on a GPU: whatever backends look at makes another question."""
    asked = []
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    monkeypatch.setattr(dispatch, "MOST_CHOSEN", 20)
    monkeypatch.setattr(dispatch, "ORDINARY", (SimpleNamespace,))
    monkeypatch.setattr(dispatch, "_ask", lambda *problem: asked.append(problem) or object())

    def inputs(batch=3, dtype=torch.float32, index=0, numel=1):
        device = SimpleNamespace(index=index)
        return SimpleNamespace(
            is_cuda=True, dtype=dtype, device=device, size=lambda _: batch, numel=lambda: numel
        )  # fmt: skip

    plain = Weights(torch.zeros(16, 3), torch.zeros(16, 4))
    normed = plain._replace(norm_weight=torch.ones(4), norm_bias=torch.ones(4))
    cell = CELLS["rkm_lstm"]
    problems = [
        (cell, inputs(), plain), (cell, inputs(batch=4), plain), (cell, inputs(dtype=torch.float16), plain),
        (cell, inputs(index=1), plain), (cell, inputs(), normed), (cell.clipped(1), inputs(), plain),
        (cell, inputs(), Weights(torch.zeros(32, 3), torch.zeros(32, 8))), (CELLS["lstm"], inputs(), plain),
        (cell.without_feedback(), inputs(), plain._replace(recurrent=None)),
    ]  # fmt: skip
    first = [dispatch._fastest(*problem) for problem in problems]
    assert len(set(map(id, first))) == len(asked) == len(problems)
    assert [dispatch._fastest(*problem) for problem in problems] == first
    assert len(asked) == len(problems)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert dispatch._fastest(*problems[0]) is not first[0]
    empty = (cell, inputs(numel=0), plain)
    assert dispatch._fastest(*empty) is not dispatch._fastest(*empty)
    for batch in range(100, 150):
        dispatch._fastest(cell, inputs(batch=batch), plain)
    assert len(dispatch._CHOSEN) <= 20
