"""A call of an RKM whose layers run both of their directions at once (:mod:`fairseq_rkm.ops.two_directions`)."""

from contextlib import nullcontext

import torch
from torch import Tensor

from fairseq_rkm.modules.parameters import RKMParameters
from fairseq_rkm.modules.side_by_side import is_plain_dropout
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops import exported_loop, two_directions
from fairseq_rkm.ops.ngram import extend, extend_against_time, next_context
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.two_directions import Stack
from fairseq_rkm.ops.weights import Weights

Rows = Tensor | list[Tensor]
"""The rows of all layers and directions, ``(B, d)`` each."""


def run_at_once(
    rkm: RKMParameters, x: Tensor, hidden: Rows | None, memory: Rows | None,
    context: list[Tensor] | None, keep: Tensor | None, autocast: torch.dtype | None,
) -> tuple[list[Tensor], RKMState] | None:  # fmt: skip
    """The last layer's output, ``(T, B, 2 * d)``, and the final state; None where directions must run in turn.

    Args:
        rkm: the module.
        x: the inputs, ``(T, B, m)``.
        hidden: the initial hidden states of layers and directions, ``(B, d)`` each, or None.
        memory: their initial memories, ``(B, d)`` each, or None.
        context: the layers' inputs before the first step, ``(n - 1, B, layer_input_size)`` each, or None.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        autocast: the type of matrix products under autocast; None outside it.
    """
    if not _can(rkm, x):
        return None
    keep = None if keep is None else keep.contiguous()
    padding = None if keep is None else ~keep.unsqueeze(-1)
    if padding is not None:
        x = x.masked_fill(padding, 0)
    whole = rkm.ngram == 1 and (rkm.num_layers == 1 or is_plain_dropout(rkm.dropout))
    if whole:
        return _whole(rkm, x, hidden, memory, keep, autocast)
    return _layer_by_layer(rkm, x, hidden, memory, context, keep, padding, autocast)


def _whole(
    rkm: RKMParameters, x: Tensor, hidden: Rows | None, memory: Rows | None, keep: Tensor | None,
    autocast: torch.dtype | None,
) -> tuple[list[Tensor], RKMState]:  # fmt: skip
    """All layers as one node of autograd."""
    # Random numbers are drawn in the order of the plain way: they are the same.
    masks: list[Tensor | None] = [None]
    layers = [_weights(rkm, 0, autocast)]
    if rkm.num_layers > 1:
        dropout, like = rkm.dropout, x.new_empty((1, x.size(1), 2 * rkm.hidden_size))
        for layer in range(1, rkm.num_layers):
            masks.append(dropout.mask(like))
            layers.append(_weights(rkm, layer, autocast))
    states = _rows(hidden, 0, 2 * rkm.num_layers), _rows(memory, 0, 2 * rkm.num_layers)
    stack = Stack(rkm._cell, rkm.hidden_size, keep, x, None, *states, masks, layers)
    output, last_hidden, last_memory = _run(rkm, stack, autocast)
    return [output], RKMState(last_hidden, last_memory)


def _layer_by_layer(
    rkm: RKMParameters, x: Tensor, hidden: Rows | None, memory: Rows | None, context: list[Tensor] | None,
    keep: Tensor | None, padding: Tensor | None, autocast: torch.dtype | None,
) -> tuple[list[Tensor], RKMState]:  # fmt: skip
    """Each layer as a node of its own: PyTorch makes its windows, or others see its inputs."""
    hiddens, memories, contexts = [], [], []
    for layer in range(rkm.num_layers):
        if layer:
            x = rkm.dropout(x)
            x = x if padding is None else x.masked_fill(padding, 0)
        inputs, others = x, None
        if rkm.ngram > 1:
            before = None if context is None else context[layer]
            contexts.append(next_context(x, rkm.ngram, before, keep))
            inputs = extend(x, rkm.ngram, rkm.ngram_padding, before)
            others = extend_against_time(x, rkm.ngram, rkm.ngram_padding)
        states = _rows(hidden, 2 * layer, 2 * layer + 2), _rows(memory, 2 * layer, 2 * layer + 2)
        weights = _weights(rkm, layer, autocast)
        stack = Stack(rkm._cell, rkm.hidden_size, keep, inputs, others, *states, [None], [weights])
        x, last_hidden, last_memory = _run(rkm, stack, autocast)
        hiddens.append(last_hidden)
        memories.append(last_memory)
    return [x], RKMState(torch.cat(hiddens), torch.cat(memories), contexts or None)


def _can(rkm: RKMParameters, x: Tensor) -> bool:
    """Whether both directions may run at once."""
    if not rkm.bidirectional or rkm.proj_size or rkm.layer_norm:
        return False
    if torch.compiler.is_compiling() or exported_loop.is_recording() or not are_plain(x):
        return False
    return two_directions.runs_at_once(rkm.backend, rkm._cell, x, rkm.hidden_size)


def _run(rkm: RKMParameters, stack: Stack, autocast: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    with nullcontext() if autocast is None else torch.autocast(stack.inputs.device.type, enabled=False):
        return two_directions.recurrence(stack, rkm.backend)


def _weights(rkm: RKMParameters, layer: int, autocast: torch.dtype | None) -> tuple[Weights, Weights]:
    """The weights of a layer, along time and against it."""
    return rkm._weights(f"l{layer}", autocast), rkm._weights(f"l{layer}_reverse", autocast)


def _rows(rows: Rows | None, start: int, stop: int) -> Tensor | None:
    """The states of some layers and directions, ``(stop - start, B, d)``."""
    if rows is None:
        return None
    if isinstance(rows, list):
        return torch.stack(rows[start:stop])
    return rows if rows.size(0) == stop - start else rows[start:stop]
