"""Functions of numbers that the Triton kernels of all backends share."""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    """As ``torch.clamp``: NaN stays NaN."""
    raised = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
