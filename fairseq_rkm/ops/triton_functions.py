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


ARCSINE_TERMS = tl.constexpr(12)
"""Of the arcsine's series up to a sine of one half, in float32: the next one is below 1e-9."""


@triton.jit
def _small_arcsine(x):
    """The arcsine of up to one half: its series, in which each term has a factor of the one before."""
    square = x * x
    series = tl.full(x.shape, 1.0, tl.float32)
    for before in tl.static_range(ARCSINE_TERMS):
        odd = 2 * (ARCSINE_TERMS - before) - 1
        series = 1 + series * square * (odd * odd / ((odd + 1) * (odd + 2)))
    return x * series


@triton.jit
def acos(x):
    """The arccosine, in float32: Triton's own is found on GPUs alone."""
    large = tl.abs(x)
    # acos(x) is twice the arcsine of the half angle's sine; near 0 it is a right angle less the arcsine of x.
    is_near = large <= 0.5
    arcsine = _small_arcsine(tl.where(is_near, x, tl.sqrt((1 - large) / 2)))
    half_turn = 3.141592653589793
    far = tl.where(x > 0, 2 * arcsine, half_turn - 2 * arcsine)
    return tl.where(is_near, half_turn / 2 - arcsine, far)
