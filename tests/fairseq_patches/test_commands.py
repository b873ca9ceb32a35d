import sys
from types import SimpleNamespace

import pytest

from fairseq_rkm.fairseq_patches.commands import in_fairseq_command


@pytest.mark.parametrize(
    ("program", "module", "is_one"),
    [
        ("/bin/fairseq-train", None, True),
        ("/bin/fairseq-hydra-train", None, True),
        ("train.py", "fairseq_cli.train", True),
        ("hydra_train.py", "fairseq_rkm.hydra_train", True),
        ("predict.py", "fairseq_rkm.predict", False),
        ("train.py", None, False),
    ],
)
def test_fairseq_s_commands_and_others(monkeypatch, program, module, is_one):
    monkeypatch.setattr(sys, "argv", [program])
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    assert in_fairseq_command() is is_one
