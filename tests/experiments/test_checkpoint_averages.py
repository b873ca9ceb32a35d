import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_rkm.experiments import checkpoint_averages

SCRIPT = Path(__file__).parents[2] / "scripts/average_checkpoints.py"


def checkpoint(path, weight, **more):
    state = {"model": {"w": torch.tensor(weight), "fingerprint": torch.tensor([2**31 + 1])}, "cfg": {"seed": 1}}
    torch.save({**state, "args": argparse.Namespace(lr=1), "last_optimizer_state": {}, **more}, path)
    return path


def test_the_mean_of_the_last_epochs_in_their_order(tmp_path):
    for epoch in (1, 2, 9, 10, 11):
        checkpoint(tmp_path / f"checkpoint{epoch}.pt", [float(epoch), 1.0])
    checkpoint(tmp_path / "checkpoint_best.pt", [100.0, 1.0])
    checkpoint(tmp_path / "checkpoint_2_500.pt", [100.0, 1.0])
    out = tmp_path / "average.pt"
    subprocess.run([sys.executable, SCRIPT, tmp_path, "--last", "3", "--out", out], check=True)
    state = torch.load(out, weights_only=False)
    assert state["model"]["w"].tolist() == [10.0, 1.0]
    assert state["model"]["w"].dtype == torch.float32
    assert state["model"]["fingerprint"].tolist() == [2**31 + 1], "whole numbers stay"
    assert state["cfg"] == {"seed": 1}
    assert "last_optimizer_state" not in state


def test_what_cannot_be_averaged_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"no checkpoint1.pt, checkpoint2.pt, \.\.\. in"):
        checkpoint_averages.last_checkpoints(tmp_path, 3)
    one, other = checkpoint(tmp_path / "one.pt", [1.0]), checkpoint(tmp_path / "other.pt", [1.0, 2.0])
    with pytest.raises(SystemExit, match=r"other.pt is of another model than .*one.pt"):
        checkpoint_averages.average([one, other])
    (tmp_path / "broken.pt").write_bytes(one.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"cannot read .*broken.pt"):
        checkpoint_averages.average([tmp_path / "broken.pt"])


def test_a_checkpoint_that_carries_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path / "it_ran").touch, ()

    path = checkpoint(tmp_path / "one.pt", [1.0], gift=Code())
    with pytest.raises(SystemExit, match=r"refused .*one\.pt: it carries the class"):
        checkpoint_averages.average([path])
    assert not (tmp_path / "it_ran").exists()
