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


@functools.cache
def is_triton_before(major: int, minor: int) -> bool:
    """Whether Triton is installed and older than a version."""
    if not has_triton():
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (major, minor)
