"""Whether Triton is here, and whether it compiles its kernels or interprets them."""

import functools
import importlib.util
import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs its kernels on the CPU; it too looks once."""


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
