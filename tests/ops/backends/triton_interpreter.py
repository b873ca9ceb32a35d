"""Triton's kernels without a GPU: its interpreter runs them on a CPU, in a process with ``TRITON_INTERPRET=1``."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets."""
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
"""Where Triton's kernels run in this process, if they do."""
ONLY_COMPILES = not INTERPRETED and not HAS_GPU
"""Whether this process compiles Triton's kernels and can launch none."""


def runs(test):
    """Decorate a test that needs a GPU or Triton's interpreter."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def run_interpreted(file: str, *flags: str) -> None:
    """Run a file's tests in a process that interprets; skip where this process runs them itself, or Triton is missing.

    Args:
        file: a path, from ``tests/ops/backends``.
        flags: pytest's, to choose among its tests.
    """
    if HAS_GPU or INTERPRETED:
        pytest.skip("they run in this process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-v", str(Path(__file__).parent / file), *flags]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[3], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
