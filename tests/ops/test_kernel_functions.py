"""The kernels' values by their definitions, their slopes by autograd, and both where a vector is zero or far away."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.ops.kernel_functions import KERNELS, Terms, kernel_of_key, resolve_kernel

ALL = [row for rows in KERNELS.values() for row in rows]
IDS = [row.key for row in ALL]
SCALE, OFFSET = 1.3, 0.7


def by_definition(kernel, w, z):
    """K of two vectors, as its publication has it."""
    match kernel.name:
        case "linear":
            return w @ z
        case "polynomial":
            return (w @ z / SCALE + OFFSET) ** kernel.degree
        case "gaussian":
            return torch.exp(-((w - z).norm() ** 2) / (2 * SCALE**2))
    angle = torch.acos(w @ z / w.norm() / z.norm())
    if kernel.degree == 0:
        return (math.pi - angle) / math.pi
    return w.norm() * z.norm() * (angle.sin() + (math.pi - angle) * angle.cos()) / math.pi


def terms(w, z, scale=SCALE, offset=OFFSET):
    """Of filters, ``(d, n)``, and windows, ``(B, n)``."""
    each = [torch.full(w.shape[:1], value, dtype=w.dtype) for value in (scale, offset)]
    return Terms(z @ w.T, w.square().sum(1), z.square().sum(1, keepdim=True), *each)


@pytest.mark.parametrize("kernel", ALL, ids=IDS)
def test_values_are_those_of_the_definition(kernel):
    w, z = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    wanted = torch.stack([torch.stack([by_definition(kernel, filter_, window) for filter_ in w]) for window in z])
    torch.testing.assert_close(kernel.value(terms(w, z)), wanted)


@pytest.mark.parametrize("kernel", ALL, ids=IDS)
def test_slopes_are_autograd_s(kernel):
    given_ = terms(torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64))
    leaves = [t.expand(5, 4).clone().requires_grad_() for t in given_]
    wanted = torch.autograd.grad(
        kernel.value(Terms(*leaves)).sum(), leaves, allow_unused=True, materialize_grads=True
    )  # fmt: skip
    slopes = kernel.slopes(given_)
    for name, slope, grad in zip(Terms._fields, slopes, wanted, strict=True):
        full = torch.zeros(5, 4, dtype=torch.float64) if slope is None else slope.expand(5, 4)
        torch.testing.assert_close(full, grad, msg=lambda text, name=name: f"{name}: {text}")
    read = {name for name, slope in zip(Terms._fields, slopes, strict=True) if slope is not None}
    assert read & {"scale", "offset"} == set(kernel.parameters)


@pytest.mark.parametrize("kernel", ALL, ids=IDS)
def test_derivatives_of_both_orders_are_those_of_differences(kernel):
    w, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    parameters = torch.tensor([1.3, 0.9], dtype=torch.float64), torch.tensor([0.7, 1.1], dtype=torch.float64)

    def value(w, z, scale, offset):
        squares = w.square().sum(1), z.square().sum(1, keepdim=True)
        return kernel.value(Terms(z @ w.T, *squares, scale, offset))

    leaves = [t.requires_grad_() for t in (w, z, *parameters)]
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


EXTREMES = [
    (torch.zeros(1, 3), torch.zeros(1, 3)),
    (torch.zeros(1, 3), torch.ones(1, 3)),
    (torch.ones(1, 3), torch.zeros(1, 3)),
    (torch.ones(1, 3), torch.ones(1, 3)),
    (torch.ones(1, 3), -torch.ones(1, 3)),
    (torch.ones(1, 3), torch.full((1, 3), 1e4)),
    (torch.full((1, 3), -2.0), torch.full((1, 3), 1e4)),
    (torch.full((1, 3), 1e4), torch.full((1, 3), 1e4)),
    (torch.ones(1, 3), torch.full((1, 3), 1e-25)),
]


@pytest.mark.parametrize("kernel", [row for row in ALL if row.degree in (None, 0, 1, 2, 3)], ids=lambda row: row.key)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_finite_at_extremes(kernel, dtype):
    for pair in EXTREMES:
        w, z = (t.to(dtype, copy=True).requires_grad_() for t in pair)
        given_ = terms(w, z)
        value = kernel.value(given_)
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), [w, z], materialize_grads=True,
                                                                   allow_unused=True))  # fmt: skip
        slopes = kernel.slopes(given_)
        assert all(slope is None or slope.isfinite().all() for slope in slopes)
        if kernel.bound is not None:
            assert value.abs() <= kernel.bound


@pytest.mark.parametrize("kernel", ALL, ids=IDS)
def test_missing_numbers_are_not_hidden(kernel):
    for w, z in ((torch.tensor([[torch.nan]]), torch.ones(1, 1)), (torch.ones(1, 1), torch.tensor([[torch.nan]]))):
        assert kernel.value(terms(w, z)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_meets_itself_at_no_angle(dtype):
    for _ in range(20):
        w = torch.randn(1, 3, dtype=dtype)
        assert resolve_kernel("arccos", 0).value(terms(w, w)).item() == 1
        assert resolve_kernel("arccos", 0).value(terms(w, -w)).item() == 0
        torch.testing.assert_close(resolve_kernel("arccos", 1).value(terms(w, w))[0], w.square().sum(1))


def test_a_zero_vector_stands_at_a_right_angle():
    for degree, wanted in ((0, 0.5), (1, 0.0)):
        for w, z in EXTREMES[:3]:
            assert resolve_kernel("arccos", degree).value(terms(w, z)).item() == pytest.approx(wanted)


@given(scale=st.floats(1e-30, 1e30), length=st.floats(0, 1e4))
@settings(deadline=None)
def test_a_gaussian_is_finite_at_any_scale(scale, length):
    w, z = torch.ones(1, 3), torch.full((1, 3), length)
    given_ = terms(w, z, scale)
    kernel = resolve_kernel("gaussian")
    assert 0 <= kernel.value(given_) <= 1
    assert not any(slope is not None and slope.isnan().any() for slope in kernel.slopes(given_))


def test_bounds_are_those_of_the_definitions():
    bounded = {(row.name, row.degree) for row in ALL if row.bound is not None}
    assert bounded == {("gaussian", None), ("arccos", 0)}


def test_kernels_are_found_by_name_degree_and_key():
    assert [resolve_kernel(name).key for name in KERNELS] == ["linear", "polynomial2", "gaussian", "arccos1"]
    assert all(resolve_kernel(row.name, row.degree) is row and kernel_of_key(row.key) is row for row in ALL)


@pytest.mark.parametrize(
    ("name", "degree", "sentence"),
    [
        ("cubic", None, "unknown kernel 'cubic'; choose one of linear, polynomial, gaussian, arccos"),
        (None, None, "unknown kernel None"),
        ("polynomial", 0, "degree of the kernel 'polynomial' must be a whole number from 1 to 8, not 0"),
        ("polynomial", -1, "must be a whole number from 1 to 8, not -1"),
        ("polynomial", 2.5, "must be a whole number from 1 to 8, not 2.5"),
        ("polynomial", True, "not True"),
        ("arccos", 2, "degree of the kernel 'arccos' must be 0 or 1, not 2"),
        ("gaussian", 1, "the kernel 'gaussian' has no degree: leave it out"),
    ],
)
def test_what_is_no_kernel_is_refused(name, degree, sentence):
    with pytest.raises(RKMError, match=sentence):
        resolve_kernel(name, degree)
