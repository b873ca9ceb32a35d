"""On GPUs, with feedback, for layers of any size: a product and a Triton kernel a step, replayed as CUDA graphs."""

from fairseq_rkm.ops.backends.stepwise.estimate import step_time
from fairseq_rkm.ops.backends.stepwise.stepwise import PASSES, refuses

__all__ = ["PASSES", "refuses", "step_time"]
