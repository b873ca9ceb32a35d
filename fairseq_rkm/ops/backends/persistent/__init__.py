"""On GPUs, with feedback: one launch for a whole sequence, in CUDA C++."""

from fairseq_rkm.ops.backends.persistent.persistent import PASSES, refuses, step_time

__all__ = ["PASSES", "refuses", "step_time"]
