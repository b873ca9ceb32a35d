"""A backend's passes under autograd, called directly: the way of all calls that nothing follows.

A call of a ``torch.library`` operator written in Python would cost some 50 us more.
"""

from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.higher_derivatives import differentiate, load, save
from fairseq_rkm.ops.operators import Operator
from fairseq_rkm.ops.passes import Saved
from fairseq_rkm.ops.weights import Weights


def run(
    operator: Operator, cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.reference.recurrence`; None stands for an initial state of zeros."""
    if not torch.is_grad_enabled():
        return operator.passes.forward(cell, inputs, weights, hidden, memory, keep)[:3]
    return _apply(operator, cell, keep, inputs, hidden, memory, *weights)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operator: Operator, cell: Cell, keep: Tensor | None, inputs: Tensor, hidden: Tensor | None,
        memory: Tensor | None, *fields: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weights = Weights(*fields)
        output, last_hidden, last_memory, own = operator.passes.forward(cell, inputs, weights, hidden, memory, keep)
        ctx.operator = operator
        ctx.set_materialize_grads(False)
        save(ctx, Saved(cell, keep, inputs, hidden, memory, weights, own))
        return output, last_hidden, last_memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        operator, needs = ctx.operator, ctx.needs_input_grad[3:]
        return None, None, None, *differentiate(operator.passes, operator.backward, load(ctx), grads, needs)


# Function.apply looks for torch.func's transforms and tensors first. Such a call does not come here.
_apply = super(torch.autograd.Function, _Recurrence).apply
