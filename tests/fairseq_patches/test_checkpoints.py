import re
import sys
from pathlib import Path

import fairseq

import fairseq_rkm
from fairseq_rkm.checkpoints import literals
from fairseq_rkm.fairseq_patches.checkpoints import EVALUATING


def test_every_eval_of_fairseq_s_takes_literals_only():
    """A module that is not in the list, as a later version of fairseq may have, fails here."""
    fairseq_rkm.register()
    root = Path(fairseq.__file__).parent
    files = (path for path in root.rglob("*.py") if path.relative_to(root).parts[0] != "examples")
    calling = {path.relative_to(root) for path in files if re.search(r"(?<![\w.])eval\(", path.read_text())}
    assert {".".join(path.with_suffix("").parts) for path in calling} == set(EVALUATING)
    for name in EVALUATING:
        assert vars(sys.modules[f"fairseq.{name}"])["eval"] is literals.evaluate
