"""Derivatives of gradients: hand-written backward passes give plain numbers, the reference differentiable ones.

A recurrence is an ``autograd.Function``. It saves its arguments with :func:`save_arguments`, and
:func:`first_derivatives` decorates its backward pass. Gradients may have to be differentiated again
(``create_graph=True``: penalties on gradients, Hessian-vector products, MAML). :mod:`fairseq_rkm.ops.reference` then
computes the recurrence anew, and autograd differentiates it, to any order.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops import reference
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.plain_tensors import obstacle
from fairseq_rkm.ops.weights import Weights, memory_dtype

Gradients = tuple[Tensor | None, ...]


class Saved(NamedTuple):
    """A recurrence's arguments, and further tensors for its backend's own backward pass."""

    cell: Cell
    keep: Tensor | None
    inputs: Tensor
    hidden: Tensor | None
    memory: Tensor | None
    weights: Weights
    own: list[Any]


def save_arguments(
    ctx: Any, cell: Cell, keep: Tensor | None, inputs: Tensor, hidden: Tensor | None, memory: Tensor | None,
    weights: Weights, *own: Tensor | None,
) -> None:  # fmt: skip
    """Keep the content of :class:`Saved` for the backward pass."""
    ctx.cell, ctx.numbers = cell, weights.numbers()
    ctx.save_for_backward(keep, inputs, hidden, memory, *weights.tensors(), *own)


def _saved(ctx: Any) -> Saved:
    """Read the saved tensors; call it once: ``torch.utils.checkpoint`` gives them out a single time."""
    keep, inputs, hidden, memory, *tensors = ctx.saved_tensors
    count = len(Weights._fields)
    weights = Weights(*tensors[:count])._replace(**ctx.numbers)
    return Saved(ctx.cell, keep, inputs, hidden, memory, weights, tensors[count:])


def first_derivatives(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the hand-written backward pass of ``apply(cell, keep, inputs, hidden, memory, *weights)``.

    The pass gets the context, a :class:`Saved`, and plain gradients or None. Its results are never differentiated.
    """

    @functools.wraps(backward)
    def choose(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved = _saved(ctx)
        device = saved.inputs.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        # The forward pass has chosen its dtypes; a backward pass under autocast keeps them.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if torch.is_grad_enabled() or obstacle(*grads) is not None:
                return None, None, *_by_reference(saved, grads, ctx.needs_input_grad[2:])
            return backward(ctx, saved, *grads)

    return choose


def _by_reference(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of inputs, initial state and weights; they have a graph where one is asked for."""
    create_graph, cell = torch.is_grad_enabled(), saved.cell
    with torch.enable_grad():
        # Views cut the graph: one argument may have been computed from another.
        given = saved.inputs, saved.hidden, saved.memory, *saved.weights
        views: list[Any] = [x.view_as(x) if isinstance(x, Tensor) else x for x in given]
        inputs, hidden, memory, *fields = views
        weights = Weights(*fields)
        zeros = inputs.new_zeros(inputs.size(1), weights.input.size(0) // len(cell.gates))
        hidden = zeros if hidden is None else hidden
        memory = zeros.to(memory_dtype(inputs.dtype)) if memory is None else memory
        results = reference.recurrence(cell, inputs, weights, hidden, memory, saved.keep)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    found: list[Tensor | None] = [None] * len(wanted)
    if pairs:
        outputs, given_grads = zip(*pairs, strict=True)
        dense = [g.to_dense() if g.layout != torch.strided else g for g in given_grads]
        found = list(torch.autograd.grad(outputs, wanted, dense, create_graph=create_graph, allow_unused=True))
    rest = iter(found)
    return [next(rest) if need else None for need in needs]
