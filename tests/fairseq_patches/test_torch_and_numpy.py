import traceback

import pytest
import torch
from fairseq import utils

import fairseq_rkm


def test_seeding_is_torch_s_without_its_stack_traces(monkeypatch):
    fairseq_rkm.register()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    before = torch.random.get_rng_state()
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace"))
    with utils.set_torch_seed(5):
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(torch.random.get_rng_state(), before)
