import pytest
import torch
from fairseq.nan_detector import NanDetector
from torch import nn

import fairseq_rkm

fairseq_rkm.register()


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_pass_that_is_not_finite_is_run_again_in_silence(caplog, capsys, place):
    """The trainer runs it so before it ends; its sentence is then the last."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.ones(3, 2, requires_grad=True)
    with NanDetector(model):
        loss = model(x).sum() * (torch.inf if place == "backward" else 1)
        if place == "forward":
            model(x + torch.inf)
        loss.backward()
    assert not caplog.records
    assert capsys.readouterr() == ("", "")
    assert not any(module._forward_hooks for module in model.modules())
