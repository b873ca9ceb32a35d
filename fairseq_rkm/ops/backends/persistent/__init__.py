"""On GPUs, with feedback: one launch for a whole sequence, in CUDA C++."""

from fairseq_rkm.ops.backends.persistent.persistent import PASSES, refuses

__all__ = ["PASSES", "refuses"]
