"""Tell whether a process runs one of fairseq's commands: some changes are for these alone."""

import sys
from pathlib import Path


def in_fairseq_command() -> bool:
    """Return whether this process runs one of fairseq's commands, as a script or by ``python -m fairseq_cli...``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name.startswith("fairseq-") or (spec is not None and spec.name.startswith("fairseq_cli"))
