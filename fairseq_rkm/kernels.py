"""Gram matrices of untrained recurrent machines, for kernel methods on whole sequences.

The machine has no weights. Its state after step t is a point of the kernel's feature space::

    z_t = [sqrt(s_i) X_t, sqrt(s_f) h_{t-1}],    h_t = phi(z_t),    h_0 = 0,    phi(a)^T phi(b) = k(a, b)

Two sequences meet through inner products alone. With ``c_{t,s} = z_t^T z'_s`` these are the memory and the output of
the paper's recurrence, with the second sequence in the place of a filter::

    c_{t,s} = s_i X_t^T X'_s + s_f h_{t-1}^T h'_{s-1},    h_t^T h'_s = k(z_t, z'_s)

:func:`recurrent_gram` computes them for all pairs of sequences. docs/kernel_machines.md derives them.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops.kernel_functions import Kernel, Terms, resolve_kernel
from fairseq_rkm.ops.ngram import extend, windows

POOLINGS = ("last", "mean")
COPIES = 12
"""The tensors of a tile's size that live at once, at most."""


class _Machine(NamedTuple):
    """The kernel and the numbers of a recurrent machine."""

    kernel: Kernel
    scale: float
    offset: float
    sigma_i2: float
    sigma_f2: float

    def meet(self, dot: Tensor, filters: Tensor, windows: Tensor) -> Tensor:
        """The kernel, from inner products and squared lengths that are broadcast."""
        return self.kernel.value(Terms(dot, filters, windows, dot.new_tensor(self.scale), dot.new_tensor(self.offset)))


class _Padded(NamedTuple):
    """Some sequences as one tensor.

    Attributes:
        steps: ``(T, N, n * m)``, the windows of all steps.
        squares: ``(T, N)``, ``|z_t|^2``.
        lengths: ``(N,)`` int64, the steps of each; what stands behind them has no meaning.
    """

    steps: Tensor
    squares: Tensor
    lengths: Tensor


def recurrent_gram(
    x: Sequence[Any], y: Sequence[Any] | None = None, kernel: str = "linear", *, degree: int | None = None,
    scale: float | None = None, offset: float = 1.0, sigma_i2: float = 0.5, sigma_f2: float = 0.5, ngram: int = 1,
    pooling: str = "last", tile_bytes: int = 2**28,
) -> Tensor:  # fmt: skip
    """The Gram matrix of the untrained recurrent machine.

    Args:
        x: sequences of any lengths, ``(T_i, m)`` each, floating-point, on one device: tensors, or arrays of numpy.
        y: other sequences; None for ``x`` itself, whose matrix is symmetric and costs half.
        kernel: a name of :data:`fairseq_rkm.ops.kernel_functions.KERNELS`.
        degree: of ``"polynomial"`` (2) or ``"arccos"`` (1).
        scale: s; None is 1 for a polynomial and ``sqrt(n * m)`` for a Gaussian.
        offset: b of a polynomial, at least 0.
        sigma_i2: ``s_i``, above 0.
        sigma_f2: ``s_f``, from 0; 0 is no recurrence.
        ngram: n, the inputs that a step sees.
        pooling: ``"last"`` compares the states after the last steps, so that sequences are aligned at their ends;
            ``"mean"`` compares the means of all states, so that each step meets each other. The former takes
            ``min(T_i, T'_j)`` steps a pair, the latter ``T_i * T'_j``.
        tile_bytes: about how much memory a tile of the matrix may take while it is computed. The matrix itself and one
            copy of the sequences come on top.

    Returns:
        ``(len(x), len(y))``, of the sequences' dtype and on their device. It is positive semi-definite for ``y=None``,
        up to rounding: give float64 where that matters. A sequence without steps has an inner product of 0 with all.

    Raises:
        RKMError: an argument outside its range, sequences that do not fit together, or values beyond the dtype.

    Source:
        Section 2 of Liang et al. (2019); Hermans and Schrauwen (2012) have the same recursion for echo state networks.

    Example:
        >>> train = recurrent_gram(documents, kernel="gaussian", pooling="mean")
        >>> model = sklearn.svm.SVC(kernel="precomputed").fit(train.cpu(), labels)
        >>> model.predict(recurrent_gram(others, documents, kernel="gaussian", pooling="mean").cpu())
    """
    row = resolve_kernel(kernel, degree)
    _check_numbers(row, scale, offset, sigma_i2, sigma_f2, ngram, pooling, tile_bytes)
    first = _sequences("x", x)
    second = first if y is None else _sequences("y", y)
    _check_fit(first, second)
    features = ngram * first[0].size(1)
    machine = _Machine(row, row.default_scale(features) if scale is None else scale, offset, sigma_i2, sigma_f2)
    pair, cost = (_last, 1) if pooling == "last" else (_mean, max(len(sequence) for sequence in second))
    side = max(1, math.isqrt(tile_bytes // (COPIES * first[0].element_size() * max(1, cost))))
    gram = first[0].new_empty(len(first), len(second))
    with torch.no_grad():
        _fill(gram, first, second, machine, ngram, pair, side)
    if not gram.isfinite().all():
        raise RKMError(
            f"the {kernel} kernel takes these sequences beyond {gram.dtype}, or they are not finite: give a larger "
            "scale, a smaller sigma_f2 or degree, or float64"
        )
    return gram


def _fill(
    gram: Tensor, first: list[Tensor], second: list[Tensor], machine: _Machine, ngram: int,
    pair: Callable[[_Machine, _Padded, _Padded], Tensor], side: int,
) -> None:  # fmt: skip
    """Fill the matrix tile by tile, a symmetric one above its diagonal alone."""
    symmetric = first is second
    for i, rows in enumerate(_blocks(first, side)):
        one = _padded(first, rows, machine, ngram)
        for j, columns in enumerate(_blocks(second, side)):
            if symmetric and j < i:
                continue
            tile = pair(machine, one, one if symmetric and i == j else _padded(second, columns, machine, ngram))
            if symmetric and i == j:
                tile = (tile + tile.t()) / 2  # a product's sums round differently above and below the diagonal
            gram[rows.unsqueeze(1), columns] = tile
            if symmetric and i != j:
                gram[columns.unsqueeze(1), rows] = tile.t()


def _blocks(sequences: list[Tensor], side: int) -> Sequence[Tensor]:
    """The numbers of the sequences of each block; those of like length share one, so that little is padding."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return lengths.argsort(stable=True).to(sequences[0].device).split(side)


def _padded(sequences: list[Tensor], numbers: Tensor, machine: _Machine, ngram: int) -> _Padded:
    chosen = [sequences[i] for i in numbers.tolist()]
    inputs = pad_sequence(chosen)
    steps = windows(extend(inputs, ngram, "causal", None), ngram)
    own, squares = steps.new_zeros(len(chosen)), steps.new_empty(steps.shape[:2])
    for t in range(steps.size(0)):
        squares[t] = machine.sigma_i2 * steps[t].square().sum(1) + machine.sigma_f2 * own
        own = machine.meet(squares[t], squares[t], squares[t])
    return _Padded(steps, squares, torch.tensor([len(sequence) for sequence in chosen], device=steps.device))


def _last(machine: _Machine, one: _Padded, other: _Padded) -> Tensor:
    """The inner products of the last states, ``(N, N')``; sequences are aligned at their ends."""
    gram = one.steps.new_zeros(len(one.lengths), len(other.lengths))
    for back in range(min(one.steps.size(0), other.steps.size(0)) - 1, -1, -1):
        (left, left_squares), (right, right_squares) = _from_end(one, back), _from_end(other, back)
        dot = machine.sigma_i2 * (left @ right.t()) + machine.sigma_f2 * gram
        both = (one.lengths > back).unsqueeze(1) & (other.lengths > back)
        gram = torch.where(both, machine.meet(dot, right_squares, left_squares.unsqueeze(1)), 0)
    return gram


def _from_end(padded: _Padded, back: int) -> tuple[Tensor, Tensor]:
    """Windows and squares so many steps before the last; of a shorter sequence anything."""
    at = (padded.lengths - 1 - back).clamp(min=0)
    row = torch.arange(len(at), device=at.device)
    return padded.steps[at, row], padded.squares[at, row]


def _mean(machine: _Machine, one: _Padded, other: _Padded) -> Tensor:
    """The inner products of the means of all states, ``(N, N')``."""
    length, count, features = other.steps.shape
    flat = other.steps.reshape(-1, features).t()
    real = torch.arange(length, device=flat.device).unsqueeze(1) < other.lengths
    now = flat.new_zeros(len(one.lengths), length, count)
    total = flat.new_zeros(len(one.lengths), count)
    for t in range(one.steps.size(0)):
        dot = machine.sigma_i2 * (one.steps[t] @ flat).unflatten(1, (length, count))
        dot[:, 1:] += machine.sigma_f2 * now[:, :-1]
        both = real & (one.lengths > t).view(-1, 1, 1)
        now = torch.where(both, machine.meet(dot, other.squares, one.squares[t].view(-1, 1, 1)), 0)
        total += now.sum(1)
    pairs = one.lengths.unsqueeze(1) * other.lengths
    return total / pairs.clamp(min=1)


def _sequences(name: str, given: Any) -> list[Tensor]:
    """The sequences as tensors.

    Raises:
        RKMError: there are none, or one is no matrix of floating-point numbers.
    """
    sequences = [torch.as_tensor(sequence) for sequence in given]
    if not sequences:
        raise RKMError(f"{name} holds no sequences: a Gram matrix needs one at least")
    for i, sequence in enumerate(sequences):
        if sequence.dim() != 2 or not sequence.is_floating_point():
            shape = f"{sequence.dtype} of shape {tuple(sequence.shape)}"
            raise RKMError(f"{name}[{i}] must be floating-point numbers of shape (steps, features), not {shape}")
    return sequences


def _check_fit(first: list[Tensor], second: list[Tensor]) -> None:
    """Raise RKMError unless all sequences have the features, dtype and device of the first."""
    wanted = first[0].size(1), first[0].dtype, first[0].device
    for name, sequences in (("x", first), ("y", second)):
        for i, sequence in enumerate(sequences):
            own = sequence.size(1), sequence.dtype, sequence.device
            if own != wanted:
                raise RKMError(
                    f"{name}[{i}] has {own[0]} features, {own[1]}, on {own[2]}, but x[0] {wanted[0]}, {wanted[1]}, on "
                    f"{wanted[2]}: all sequences must be alike"
                )
    if not wanted[0]:
        raise RKMError("the sequences have no features")


def _check_numbers(
    kernel: Kernel, scale: Any, offset: Any, sigma_i2: Any, sigma_f2: Any, ngram: Any, pooling: Any, tile_bytes: Any
) -> None:
    """Raise RKMError for a number outside its range."""
    if pooling not in POOLINGS:
        raise RKMError(f"unknown pooling {pooling!r}; choose one of {', '.join(POOLINGS)}")
    if scale is not None and "scale" not in kernel.parameters:
        raise RKMError(f"the kernel {kernel.name!r} has no scale: leave it out")
    for what, value, above in (
        ("scale", 1.0 if scale is None else scale, True), ("offset", offset, False), ("sigma_i2", sigma_i2, True),
        ("sigma_f2", sigma_f2, False),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, Real):
            raise RKMError(f"{what} must be a number, not {value!r}")
        if not math.isfinite(value) or value < 0 or (above and value == 0):
            raise RKMError(f"{what} must be {'above' if above else 'at least'} 0 and finite, not {value}")
    for what, value in (("ngram", ngram), ("tile_bytes", tile_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RKMError(f"{what} must be a whole number from 1, not {value!r}")
