import pytest
import torch

from fairseq_rkm.tasks import late_log
from fairseq_rkm.tasks.late_log import LateLog

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def outputs(device, update):
    """Of two processes."""
    return [{"loss": torch.tensor(update + rank / 2, device=device), "ntokens": 10 * update + rank} for rank in (0, 1)]


@pytest.mark.parametrize("device", DEVICES)
def test_all_that_an_update_logs_comes_with_the_next(monkeypatch, device):
    monkeypatch.setattr(late_log, "_is_on_gpu", lambda _: True)
    log = LateLog()
    for update, arriving in enumerate((0, 0, 1, 2)):
        given = log.exchange(outputs(device, update))
        assert given == [{"loss": arriving + rank / 2, "ntokens": 10 * arriving + rank} for rank in (0, 1)]
        assert all(type(output["loss"]) is float for output in given)


def test_what_may_change_its_keys_comes_with_them(monkeypatch):
    monkeypatch.setattr(late_log, "_is_on_gpu", lambda _: True)
    log = LateLog()
    log.exchange([{"loss": torch.tensor(1.0)}])
    assert log.exchange([{"loss": torch.tensor(2.0), "ar": torch.tensor(3.0)}]) == [{"loss": 1.0}]
    assert log.exchange([{"loss": torch.tensor(4.0)}]) == [{"loss": 2.0, "ar": 3.0}]


def test_what_is_no_number_on_a_gpu_is_left_as_it_is(monkeypatch):
    log, given = LateLog(), outputs("cpu", 1)
    assert log.exchange(given) is given
    assert log.exchange([{"ntokens": 3}]) == [{"ntokens": 3}]
    monkeypatch.setattr(late_log, "_is_on_gpu", lambda _: True)
    large = [{"loss": torch.tensor(1.0), "scores": torch.zeros(3)}]
    assert log.exchange(large) is large
