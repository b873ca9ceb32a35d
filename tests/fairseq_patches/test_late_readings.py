import pytest
import torch
from helpers import DEVICES

from fairseq_rkm.fairseq_patches.late_readings import LateValues


@pytest.mark.parametrize("device", DEVICES)
def test_values_arrive_a_call_late_and_the_first_at_once(device):
    values = LateValues()
    shown = [values.exchange(torch.full((2,), float(i), device=device)) for i in range(5)]
    assert [arrived.tolist() for arrived in shown] == [[i, i] for i in (0, 0, 1, 2, 3)]
    assert all(arrived.device.type == "cpu" for arrived in shown)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_overwritten_afterwards_has_been_sent(device):
    values, buffer = LateValues(), torch.zeros(3, device=device)
    for i in range(4):
        buffer.fill_(i)
        arrived = values.exchange(buffer)
    assert arrived.tolist() == [2, 2, 2]
