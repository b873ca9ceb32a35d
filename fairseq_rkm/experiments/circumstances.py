"""The circumstances of a figure: machine, versions, commit and command."""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
"""The repository's folder."""
PLUGIN = ROOT / "fairseq_rkm"
"""The plugin's folder, for ``--user-dir``."""


def circumstances(config: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit of this process.

    Args:
        config: the recipe's name, or None.
    """
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    return {
        "config": config,
        "commit": commit.stdout.strip() or "unknown",
        "hardware": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return names[0] if names else platform.processor() or platform.machine()


def portable(flags: Iterable[object], **folders: Path) -> str:
    """A command without this machine's paths: ``folders`` appear by their names, and the repository as ``.``."""
    named = sorted(({".": ROOT} | folders).items(), key=lambda pair: -len(str(pair[1])))

    def short(flag: str) -> str:
        for name, folder in named:
            if flag == str(folder) or flag.startswith(f"{folder}/"):
                return name + flag[len(str(folder)) :]
        return flag

    return shlex.join(short(str(flag)) for flag in flags)
