"""A backend's two passes: plain functions of tensors, without autograd.

:mod:`fairseq_rkm.ops.eager` makes an ``autograd.Function`` of any backend's passes, and
:mod:`fairseq_rkm.ops.operators` an operator that PyTorch knows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.weights import Weights, memory_dtype

Gradients = tuple[Tensor | None, ...]
"""Of a forward pass's three results, or of its inputs, hidden, memory and the fields of :class:`Weights`."""


class Results(NamedTuple):
    """The results of a forward pass.

    Attributes:
        output: all ``h_t``, ``(T, B, d)``, zero at padding.
        hidden: the last ``h_t``, ``(B, d)``.
        memory: the last ``c_t``, ``(B, d)``.
        own: tensors for the backend's own backward pass, as :attr:`Passes.own` sketches them.
    """

    output: Tensor
    hidden: Tensor
    memory: Tensor
    own: tuple[Tensor | None, ...] = ()


class Saved(NamedTuple):
    """A recurrence's arguments, and its forward pass's :attr:`Results.own`."""

    cell: Cell
    keep: Tensor | None
    inputs: Tensor
    hidden: Tensor | None
    memory: Tensor | None
    weights: Weights
    own: Sequence[Any]


class Extent(NamedTuple):
    """The sizes and dtypes of a recurrence.

    Attributes:
        steps: T.
        batch: B.
        size: d.
        gates: the number of gates times d.
        narrow: the dtype of inputs, outputs and matrices.
        wide: the memory's dtype.
        norm: whether the memory is normalised.
    """

    steps: int
    batch: int
    size: int
    gates: int
    narrow: torch.dtype
    wide: torch.dtype
    norm: bool

    @classmethod
    def of(cls, cell: Cell, inputs: Tensor, weights: Weights) -> "Extent":
        """The extent of a recurrence over extended inputs."""
        gates, ngram = weights.input.size(0), weights.input.size(1) // inputs.size(2)
        return cls(
            inputs.size(0) - ngram + 1, inputs.size(1), gates // len(cell.gates), gates, inputs.dtype,
            memory_dtype(inputs.dtype), weights.norm_weight is not None,
        )  # fmt: skip


Sketch = tuple[tuple[int, ...], torch.dtype]
"""The shape and dtype of a contiguous tensor."""


class Passes(NamedTuple):
    """A backend's passes.

    Attributes:
        forward: ``(cell, inputs, weights, hidden, memory, keep)`` to :class:`Results`. All tensors are contiguous, and
            as :func:`fairseq_rkm.ops.reference.recurrence` describes them; an initial state of zeros may be None.
        backward: ``(saved, grads, needs)`` to the gradients of inputs, hidden, memory and the fields of
            :class:`Weights`. ``grads`` are those of output, hidden and memory, None for zeros. ``needs`` has True for
            each result that is wanted; the others are None.
        own: the sketches of :attr:`Results.own` for an :class:`Extent`; None for a tensor that is None.
    """

    forward: Callable[..., Results]
    backward: Callable[[Saved, Gradients, Sequence[bool]], Gradients]
    own: Callable[[Extent], tuple[Sketch | None, ...]]


class Directions(NamedTuple):
    """A backend's passes for both directions of a layer at once: its loops alone, in memory that is given.

    All tensors are contiguous. Values of the two directions lie side by side in the last dimension, the one along time
    first. Steps are in the order of time for both. ``hiddens`` and ``memories`` are those of a stack of L layers,
    ``(L, T + 2, B, 2 * d)``: those behind the step at time t lie at t + 1, the initial ones along time at 0, and those
    against time at T + 1. The other halves of these two rows may hold anything. States and their gradients are the
    stack's, too, ``(2 * L, B, d)``; ``number`` is the layer's.

    Attributes:
        forward: ``(cell, weights, keep, gates, number, first, last, hiddens, memories, output)``. ``weights`` are two
            :class:`Weights`. ``gates``, ``(T, B, 2 * G * d)``, hold the inputs' products, without the bias, and become
            the activated gates. The states before the sequence are ``first``, a pair with None for zeros; those behind
            it are written to the pair ``last``, and all others to ``hiddens`` and ``memories``. The outputs go to
            ``output``, ``(T, B, 2 * d)``, zero at padding; None stands for no need of them.
        backward: ``(cell, weights, keep, gates, number, memories, grad_output, last, first, grad_gates)``. The
            gradients of the pre-activations are written to ``grad_gates``, and those of the initial states to
            ``first``, ``(2, 2 * L, B, d)``, of the memory's dtype. ``grad_output`` may be None, and so may be the
            gradients of both states behind the sequence, ``last``, of the same dtype.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
