"""Tell whether a process runs one of fairseq's commands: some changes are for these alone."""

import sys
from pathlib import Path


def in_fairseq_command() -> bool:
    """Return whether this process runs one of fairseq's commands, as a script or by ``python -m fairseq_cli...``.

    ``python -m fairseq_rkm.hydra_train`` is one of them.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name if spec is not None else ""
    as_module = module.startswith(("fairseq_cli", "fairseq_rkm.hydra_train"))
    return as_module or Path(sys.argv[0]).name.startswith("fairseq-")
