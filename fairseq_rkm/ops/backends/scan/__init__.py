"""On GPUs, without feedback: parallel in time, in Triton."""

from fairseq_rkm.ops.backends.scan.scan import PASSES, refuses

__all__ = ["PASSES", "refuses"]
