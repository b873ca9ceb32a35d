"""A call of an RKM whose layers run side by side (:mod:`fairseq_rkm.ops.wavefront`)."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from fairseq_rkm.modules.dropout import LockedDropout
from fairseq_rkm.modules.parameters import RKMParameters
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops import exported_loop, wavefront, wavefront_plan
from fairseq_rkm.ops.ngram import extend, next_context
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.wavefront import Layer, Stack
from fairseq_rkm.ops.wavefront_plan import Plan


def run_side_by_side(
    rkm: RKMParameters, x: Tensor, hidden: Tensor | list[Tensor] | None, memory: Tensor | list[Tensor] | None,
    context: list[Tensor] | None, keep: Tensor | None, autocast: torch.dtype | None,
) -> tuple[list[Tensor], RKMState] | None:  # fmt: skip
    """The last layer's output, ``(T, B, d)``, and the final state; None where the layers must run in order.

    Args:
        rkm: the module.
        x: the inputs, ``(T, B, m)``.
        hidden: the initial hidden states of the layers, ``(B, d)`` each, or None.
        memory: their initial memories, ``(B, d)`` each, or None.
        context: their inputs before the first step, ``(n - 1, B, layer_input_size)`` each, or None.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        autocast: the type of matrix products under autocast; None outside it.
    """
    plan = _plan(rkm, x, keep)
    if plan is None:
        return None
    if keep is not None:
        x = x.masked_fill(~keep.unsqueeze(-1), 0)
    contexts = [None] * rkm.num_layers if context is None else context
    layers = []
    # Random numbers are drawn in the order of the plain way: they are the same.
    for number in range(rkm.num_layers):
        mask = rkm.dropout.mask(x.new_empty(1, x.size(1), rkm.hidden_size)) if number else None
        first = None if hidden is None else hidden[number], None if memory is None else memory[number]
        weights = rkm._weights(f"l{number}", autocast)
        layers.append(Layer(*first, mask, contexts[number] if number else None, weights))
    inputs = extend(x, rkm.ngram, "causal", contexts[0])
    stack = Stack(rkm._cell, rkm.hidden_size, rkm.ngram, keep, inputs, layers)
    with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
        output, last_hidden, last_memory, *inner = wavefront.recurrence(stack, rkm.backend, plan)
    if rkm.ngram == 1:
        return [output], RKMState(last_hidden, last_memory)
    pairs = zip([x, *inner], contexts, strict=True)
    behind = [next_context(own, rkm.ngram, before, keep) for own, before in pairs]
    return [output], RKMState(last_hidden, last_memory, behind)


def stretches(rkm: RKMParameters, x: Tensor, recorded: bool = False) -> int:
    """The number of stretches of time over which the layers run side by side; 1 if they run in order.

    Args:
        rkm: the module.
        x: its inputs, ``(T, B, m)``.
        recorded: whether the call is recorded as a CUDA graph; calls like it have run before.
    """
    plan = _plan(rkm, x, None, recorded)
    return 1 if plan is None else len(plan.bounds(x.size(0)))


def _plan(rkm: RKMParameters, x: Tensor, keep: Tensor | None, recorded: bool | None = None) -> Plan | None:
    """How the layers run side by side; None where they must run in order."""
    if rkm.num_layers == 1 or rkm.wavefront == 1 or rkm.bidirectional or rkm.layer_norm or rkm.proj_size:
        return None
    if rkm.ngram > 1 and rkm.ngram_padding != "causal":  # a window reaches into what the layer below has yet to do
        return None
    if torch.compiler.is_compiling() or exported_loop.is_recording() or not are_plain(x):
        return None
    if not is_plain_dropout(rkm.dropout):
        return None
    return wavefront_plan.plan_for(
        rkm.backend, rkm._cell, x, rkm.num_layers, rkm.hidden_size, keep is not None, rkm.wavefront, recorded
    )


def is_plain_dropout(dropout: LockedDropout) -> bool:
    """Whether the dropout between layers is a mask alone, and nobody looks at its inputs and outputs."""
    hooks = dropout._forward_hooks, dropout._forward_pre_hooks, dropout._backward_hooks, dropout._backward_pre_hooks
    return type(dropout) is LockedDropout and not any(hooks) and not _has_any_global_hook()
