"""On CPUs, in float32: C, compiled once for the machine."""

from fairseq_rkm.ops.backends.native.native import PASSES, refuses

__all__ = ["PASSES", "refuses"]
