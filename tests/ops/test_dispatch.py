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
