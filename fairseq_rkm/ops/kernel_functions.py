"""The kernels through which a candidate's filters meet their windows, stated once, as data.

A filter ``w_j`` holds row j of the candidate's weights ``[W, U]``, and ``z_t`` the numbers that it multiplies: ``X_t``
and, where the candidate sees it, ``h_{t-1}``. The candidate is ``c~_t[j] = k(w_j, z_t) + bias_j``. A kernel here is a
function of ``w^T z``, ``|w|^2`` and ``|z|^2``: the product that the linear kernel takes, and norms.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError

LARGEST_DEGREE = 8
"""The largest degree of a polynomial: values of 1e4 raised to it are finite in float32."""
FARTHEST = 2e3
"""The largest squared distance in units of ``s^2``: its Gaussian is 0 in float64 and so are all of its slopes."""


class Terms(NamedTuple):
    """What a kernel is a function of.

    Attributes:
        dot: ``w^T z``, ``(..., d)``.
        filters: ``|w|^2``, ``(d,)``.
        windows: ``|z|^2``, ``(..., 1)``.
        scale: s, ``(d,)``.
        offset: b, ``(d,)``.
    """

    dot: Tensor
    filters: Tensor
    windows: Tensor
    scale: Tensor
    offset: Tensor


class Slopes(NamedTuple):
    """A kernel's derivatives with respect to each of :class:`Terms`; None is zero."""

    dot: Tensor
    filters: Tensor | None = None
    windows: Tensor | None = None
    scale: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """One row of the table of kernels.

    Attributes:
        name: the name that users type.
        degree: p of a polynomial, the degree of an arc-cosine kernel; None for others.
        equation: k(w, z), as the README prints it.
        parameters: those of ``"scale"`` and ``"offset"`` that it reads.
        bound: the largest ``|k(w, z)|``; None if there is none.
        value: k of :class:`Terms`; autograd differentiates it, to any order, without NaN at zero vectors.
        slopes: the derivatives of ``value``.
    """

    name: str
    degree: int | None
    equation: str = field(compare=False)
    parameters: tuple[str, ...] = field(compare=False)
    bound: float | None = field(compare=False)
    value: Callable[..., Tensor] = field(compare=False, repr=False)
    slopes: Callable[..., Slopes] = field(compare=False, repr=False)

    @property
    def is_linear(self) -> bool:
        return self.name == "linear"

    @property
    def key(self) -> str:
        """The kernel as a word; :func:`kernel_of_key` reads it."""
        return self.name if self.degree is None else f"{self.name}{self.degree}"

    def default_scale(self, features: int) -> float:
        """The s of a kernel that is given none, for a ``z`` of so many features.

        A Gaussian's is the length of ``z`` if its features have variance 1: to a much smaller one all windows are
        infinitely far. A polynomial's is 1.
        """
        return math.sqrt(features) if self.name == "gaussian" else 1.0


def _linear(terms: Terms) -> Tensor:
    return terms.dot


def _linear_slopes(terms: Terms) -> Slopes:
    return Slopes(torch.ones_like(terms.dot))


def _polynomial(degree: int, terms: Terms) -> Tensor:
    return (terms.dot / terms.scale + terms.offset) ** degree


def _polynomial_slopes(degree: int, terms: Terms) -> Slopes:
    outer = degree * (terms.dot / terms.scale + terms.offset) ** (degree - 1)
    dot = outer / terms.scale
    return Slopes(dot, scale=-dot * (terms.dot / terms.scale), offset=outer)


def _distance(terms: Terms) -> Tensor:
    """``|w - z|^2 / s^2``, not clamped; divided twice, since the square of a small s may be 0."""
    return (terms.filters + terms.windows - 2 * terms.dot) / terms.scale / terms.scale


def _gaussian(terms: Terms) -> Tensor:
    return torch.exp(_distance(terms).clamp(0.0, FARTHEST) / -2)


def _gaussian_slopes(terms: Terms) -> Slopes:
    raw = _distance(terms)
    distance = raw.clamp(0.0, FARTHEST)
    # Rounding may take a distance of 0 below: the clamp has no slope there.
    value = torch.exp(distance / -2) * (raw >= 0)
    dot = value / terms.scale / terms.scale
    return Slopes(dot, dot / -2, dot / -2, value * distance / terms.scale)


class _Angle(NamedTuple):
    """Lengths of w and z, 1 in place of 0; whether both are above 0; the cosine of their angle, not clamped."""

    filter: Tensor
    window: Tensor
    present: Tensor
    cosine: Tensor


def _angle(terms: Terms) -> _Angle:
    # A root has no slope at 0; a zero vector stands at a right angle to all.
    lengths = [torch.where(square > 0, square, 1).sqrt() for square in (terms.filters, terms.windows)]
    present = (terms.filters > 0) & (terms.windows > 0)
    return _Angle(lengths[0], lengths[1], present, terms.dot / lengths[0] / lengths[1])


def _largest(cosine: Tensor) -> float:
    """The magnitude of cosines from which on two vectors count as parallel: an angle has no slope at 0 and pi."""
    return 1 - 8 * torch.finfo(cosine.dtype).eps


def _clamped(cosine: Tensor) -> Tensor:
    return cosine.clamp(-_largest(cosine), _largest(cosine))


def _are_parallel(cosine: Tensor) -> Tensor:
    return cosine.abs() > _largest(cosine)


def _radians(cosine: Tensor) -> Tensor:
    """The angle of a cosine; exactly 0 or pi for parallel vectors, so that a vector meets itself as it should."""
    ends = torch.where(cosine > 0, torch.zeros_like(cosine), math.pi)
    return torch.where(_are_parallel(cosine), ends, torch.acos(_clamped(cosine)))


def _sine(cosine: Tensor) -> Tensor:
    """The sine of a cosine's angle; exactly 0 for parallel vectors."""
    clamped = _clamped(cosine)
    return torch.where(_are_parallel(cosine), 0.0, ((1 - clamped) * (1 + clamped)).sqrt())


def _arccos0(terms: Terms) -> Tensor:
    return 1 - _radians(_angle(terms).cosine) / math.pi


def _arccos0_slopes(terms: Terms) -> Slopes:
    filter_, window, _, raw = _angle(terms)
    cosine = _clamped(raw)
    of_cosine = ~_are_parallel(raw) / (math.pi * ((1 - cosine) * (1 + cosine)).sqrt())
    by_squares = of_cosine * cosine / -2
    return Slopes(
        of_cosine / filter_ / window,
        torch.where(terms.filters > 0, by_squares / filter_ / filter_, 0),
        torch.where(terms.windows > 0, by_squares / window / window, 0),
    )


def _arccos1(terms: Terms) -> Tensor:
    filter_, window, present, cosine = _angle(terms)
    bent = torch.where(present, filter_ * window * _sine(cosine), 0)
    return (bent + (math.pi - _radians(cosine)) * terms.dot) / math.pi


def _arccos1_slopes(terms: Terms) -> Slopes:
    filter_, window, present, cosine = _angle(terms)
    sine = torch.where(present, _sine(cosine), 0) / (2 * math.pi)
    return Slopes(1 - _radians(cosine) / math.pi, sine * (window / filter_), sine * (filter_ / window))


def _polynomial_row(degree: int) -> Kernel:
    value, slopes = functools.partial(_polynomial, degree), functools.partial(_polynomial_slopes, degree)
    return Kernel("polynomial", degree, "(w^T z / s + b)^p", ("scale", "offset"), None, value, slopes)


LINEAR = Kernel("linear", None, "w^T z", (), None, _linear, _linear_slopes)

_ROWS = (
    LINEAR,
    _polynomial_row(2),
    *(_polynomial_row(degree) for degree in range(1, LARGEST_DEGREE + 1) if degree != 2),
    Kernel("gaussian", None, "exp(-|w - z|^2 / (2 s^2))", ("scale",), 1.0, _gaussian, _gaussian_slopes),
    Kernel(
        "arccos", 1, "|w| |z| (sin a + (pi - a) cos a) / pi, a the angle of w and z", (), None, _arccos1,
        _arccos1_slopes,
    ),
    Kernel("arccos", 0, "1 - a / pi", (), 1.0, _arccos0, _arccos0_slopes),
)  # fmt: skip

KERNELS: dict[str, tuple[Kernel, ...]] = {
    name: tuple(row for row in _ROWS if row.name == name) for name in dict.fromkeys(row.name for row in _ROWS)
}
"""The rows of each name, the default degree first. The arc-cosine kernels are those of Cho and Saul (2009)."""


def resolve_kernel(name: str, degree: int | None = None) -> Kernel:
    """The kernel called ``name``.

    Args:
        name: a key of :data:`KERNELS`.
        degree: p of a polynomial, from 1, or the degree of an arc-cosine kernel, 0 or 1; None is 2 and 1.

    Raises:
        RKMError: the name is unknown, or the kernel is of no such degree.
    """
    if not isinstance(name, str) or name not in KERNELS:
        raise RKMError(f"unknown kernel {name!r}; choose one of {', '.join(KERNELS)}")
    rows = KERNELS[name]
    if degree is None:
        return rows[0]
    if isinstance(degree, int) and not isinstance(degree, bool):
        for row in rows:
            if row.degree == degree:
                return row
    known = sorted(row.degree for row in rows if row.degree is not None)
    if not known:
        raise RKMError(f"the kernel {name!r} has no degree: leave it out")
    wanted = f"a whole number from {known[0]} to {known[-1]}" if len(known) > 2 else " or ".join(map(str, known))
    raise RKMError(f"the degree of the kernel {name!r} must be {wanted}, not {degree!r}")


@functools.cache
def kernel_of_key(key: str) -> Kernel:
    """The kernel whose :attr:`Kernel.key` this is.

    Raises:
        ValueError: it is no kernel's.
    """
    for row in _ROWS:
        if row.key == key:
            return row
    raise ValueError(key)


@functools.cache
def slopes_of(kernel: Kernel) -> tuple[str, ...]:
    """The fields of :class:`Slopes` that are not None for a kernel."""
    one = torch.ones(1, device="cpu")
    slopes = kernel.slopes(Terms(*[one] * len(Terms._fields)))
    return tuple(name for name, slope in zip(Slopes._fields, slopes, strict=True) if slope is not None)
