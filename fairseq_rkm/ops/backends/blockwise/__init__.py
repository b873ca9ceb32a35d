"""On GPUs, with feedback, for small layers: a block of threads holds a whole layer, in CUDA C++."""

from fairseq_rkm.ops.backends.blockwise.blockwise import MOST_UNITS, PASSES, refuses, step_time
from fairseq_rkm.ops.backends.blockwise.blockwise_directions import DIRECTIONS
from fairseq_rkm.ops.backends.blockwise.blockwise_stretches import STRETCHES

__all__ = ["DIRECTIONS", "MOST_UNITS", "PASSES", "STRETCHES", "refuses", "step_time"]
