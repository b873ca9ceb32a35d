import traceback

import torch
from fairseq import utils

import fairseq_rkm


def test_seeding_at_each_update_gives_torch_s_numbers_without_formatting_stacks(monkeypatch):
    fairseq_rkm.register()
    torch.manual_seed(7)
    wanted = torch.rand(3)
    state = torch.get_rng_state()
    formatted = []
    monkeypatch.setattr(traceback, "format_stack", lambda: formatted.append(1) or [])
    with utils.set_torch_seed(7):
        assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(torch.get_rng_state(), state), "afterwards, the random numbers from before"
    assert not formatted
