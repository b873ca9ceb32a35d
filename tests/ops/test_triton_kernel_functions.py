"""Kernels in Triton against the functions of tensors that they are written from: on a GPU, or in the interpreter.

The last test of ``backends/test_stepwise_candidates.py`` runs them in the interpreter.
"""

import math

import pytest
import torch

from fairseq_rkm.ops.kernel_functions import KERNELS, Slopes, Terms, slopes_of
from ops.backends.triton_interpreter import DEVICE, INTERPRETED
from ops.test_kernel_functions import EXTREMES, terms

ALL = [row for rows in KERNELS.values() for row in rows]
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def in_triton(kernel, given):
    """Value and slopes of terms, one program for all; ``(..., 6, d)``."""
    import triton
    import triton.language as tl

    from fairseq_rkm.ops.triton_kernel_functions import written

    @triton.jit
    def apply(given, out, count, VALUE: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
        at = tl.arange(0, BLOCK)
        inside = at < count
        dot = tl.load(given + at, mask=inside, other=0.0)
        filters = tl.load(given + count + at, mask=inside, other=1.0)
        windows = tl.load(given + 2 * count + at, mask=inside, other=1.0)
        scale = tl.load(given + 3 * count + at, mask=inside, other=1.0)
        offset = tl.load(given + 4 * count + at, mask=inside, other=0.0)
        by_dot, by_filters, by_windows, by_scale, by_offset = SLOPES(dot, filters, windows, scale, offset)
        tl.store(out + at, VALUE(dot, filters, windows, scale, offset), mask=inside)
        tl.store(out + count + at, tl.zeros_like(dot) + by_dot, mask=inside)
        tl.store(out + 2 * count + at, tl.zeros_like(dot) + by_filters, mask=inside)
        tl.store(out + 3 * count + at, tl.zeros_like(dot) + by_windows, mask=inside)
        tl.store(out + 4 * count + at, tl.zeros_like(dot) + by_scale, mask=inside)
        tl.store(out + 5 * count + at, tl.zeros_like(dot) + by_offset, mask=inside)

    stacked = torch.stack([term.expand(given.dot.shape).flatten().float() for term in given]).to(DEVICE)
    out = torch.full((6, stacked.size(1)), torch.nan, device=DEVICE)
    value, slopes = written(kernel)
    apply[(1,)](
        stacked, out, stacked.size(1), VALUE=value, SLOPES=slopes, BLOCK=1 << (stacked.size(1) - 1).bit_length()
    )
    return out.cpu()


@pytest.mark.parametrize("kernel", ALL, ids=lambda row: row.key)
def test_values_and_slopes_are_those_of_tensors(kernel):
    given = terms(torch.randn(7, 3), torch.randn(5, 3))
    wide = Terms(*(term.double() for term in given))
    value, *slopes = in_triton(kernel, given)
    torch.testing.assert_close(value, kernel.value(wide).flatten().float(), rtol=1e-5, atol=1e-6)
    for name, given_slope, slope in zip(Slopes._fields, slopes, kernel.slopes(wide), strict=True):
        wanted = torch.zeros(5, 7) if slope is None else slope.expand(5, 7).float()
        torch.testing.assert_close(given_slope, wanted.flatten(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
        assert (slope is not None) == (name in slopes_of(kernel))


@pytest.mark.parametrize("kernel", [row for row in ALL if row.degree in (None, 0, 1, 2, 3)], ids=lambda row: row.key)
def test_they_are_finite_at_extremes_and_hide_no_missing_number(kernel):
    for w, z in EXTREMES:
        assert in_triton(kernel, terms(w, z)).isfinite().all(), (w, z)
    missing = torch.tensor([[torch.nan]])
    for pair in ((missing, torch.ones(1, 1)), (torch.ones(1, 1), missing)):
        assert in_triton(kernel, terms(*pair))[0].isnan().all()


def test_lengths_whose_squares_are_nearly_zero_are_not_taken_for_zero():
    given = Terms(torch.tensor([[1e-20]]), torch.ones(1), torch.tensor([[1e-40]]), torch.ones(1), torch.zeros(1))
    for degree in (0, 1):
        kernel = KERNELS["arccos"][1 - degree]
        assert kernel.degree == degree
        torch.testing.assert_close(in_triton(kernel, given)[0], kernel.value(given)[0], rtol=1e-4, atol=0.0)


def test_the_arccosine_is_that_of_tensors():
    """By degree 0, whose value is ``1 - a / pi``."""
    cosines = torch.cat([torch.linspace(-1, 1, 2001), torch.tensor([0.5, -0.5, 1e-7, 1 - 2e-6, -1 + 2e-6])])
    given = Terms(cosines.unsqueeze(0), torch.ones(2006), torch.ones(1, 1), torch.ones(2006), torch.zeros(2006))
    value = in_triton(KERNELS["arccos"][1], given)[0]
    wanted = 1 - torch.acos(cosines.double()) / math.pi
    torch.testing.assert_close(value, wanted.float(), rtol=0.0, atol=2.5e-7)
