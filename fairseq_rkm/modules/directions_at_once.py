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
from fairseq_rkm.ops.two_directions import Layer


def run_at_once(
    rkm: RKMParameters, x: Tensor, hidden: Tensor | list[Tensor] | None, memory: Tensor | list[Tensor] | None,
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
    # A plain dropout leaves the zeros that the layer below has at padding.
    looked_at = padding is not None and not is_plain_dropout(rkm.dropout)
    ngram, hiddens, memories, contexts = rkm.ngram, [], [], []
    for layer in range(rkm.num_layers):
        if layer:
            x = rkm.dropout(x)
        if padding is not None and (not layer or looked_at):
            x = x.masked_fill(padding, 0)
        inputs, others = x, None
        if ngram > 1:
            before = None if context is None else context[layer]
            contexts.append(next_context(x, ngram, before, keep))
            inputs = extend(x, ngram, rkm.ngram_padding, before)
            others = extend_against_time(x, ngram, rkm.ngram_padding)
        along, against = (rkm._weights(f"l{layer}{suffix}", autocast) for suffix in ("", "_reverse"))
        states = _of_layer(hidden, layer), _of_layer(memory, layer)
        problem = Layer(rkm._cell, keep, inputs, others, *states, (along, against))
        with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
            x, last_hidden, last_memory = two_directions.recurrence(problem, rkm.hidden_size, rkm.backend)
        hiddens.append(last_hidden)
        memories.append(last_memory)
    return [x], RKMState(_joined(hiddens), _joined(memories), contexts or None)


def _can(rkm: RKMParameters, x: Tensor) -> bool:
    """Whether both directions may run at once."""
    if not rkm.bidirectional or rkm.proj_size or rkm.layer_norm:
        return False
    if torch.compiler.is_compiling() or exported_loop.is_recording() or not are_plain(x):
        return False
    return two_directions.runs_at_once(rkm.backend, rkm._cell, x, rkm.hidden_size)


def _of_layer(rows: Tensor | list[Tensor] | None, layer: int) -> Tensor | None:
    """The states of a layer, ``(2, B, d)``."""
    if rows is None:
        return None
    both = rows[2 * layer : 2 * layer + 2]
    return torch.stack(both) if isinstance(both, list) else both


def _joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat``, without a copy of a single tensor."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
