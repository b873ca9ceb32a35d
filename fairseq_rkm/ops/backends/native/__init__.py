"""On CPUs, in float32: C, compiled once for the machine."""

from fairseq_rkm.ops.backends.native.native import recurrence, refuses

__all__ = ["recurrence", "refuses"]
