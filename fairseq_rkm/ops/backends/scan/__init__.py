"""On GPUs, without feedback: parallel in time, in Triton."""

from fairseq_rkm.ops.backends.scan.scan import recurrence, refuses

__all__ = ["recurrence", "refuses"]
