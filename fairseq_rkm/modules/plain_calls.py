"""The short way of an RKM through a batch where its recurrence is all there is to do.

It is for one layer in one direction, n = 1, without padding, resets and autocast. Of a small layer's time in eager mode
the long way takes a tenth to find that out.
"""

from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.modules.parameters import RKMParameters
from fairseq_rkm.modules.short_calls import is_simple, layer_weights
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops import recurrence
from fairseq_rkm.ops.plain_tensors import ORDINARY


def run_layer(rkm: RKMParameters, x: Any, state: Any) -> tuple[Tensor, RKMState] | None:
    """The output and the final state, as ``rkm(x, state)`` gives them; None where the long way must go.

    It refuses nothing itself: of what it does not know well it leaves the judgement to the long way. The recurrence
    checks tensors and weights, as ever.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a trace would warn of each comparison below
        return None
    if type(x) not in ORDINARY or x.dim() != 3 or rkm.num_layers > 1 or rkm.learn_initial_state or not is_simple(rkm):
        return None
    if not (x.is_cuda or x.is_cpu) or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu"):
        return None
    steps = x.transpose(0, 1) if rkm.batch_first else x
    _, batch, features = steps.shape
    if features != rkm.input_size:
        return None
    weights = layer_weights(rkm, 0)
    known, rows = _rows(state, (1, batch, rkm.hidden_size))
    if not known or len(weights.present()) != len(rkm._kinds):  # parametrizations compute some
        return None
    output, hidden, memory = recurrence(rkm._cell, steps, weights, rkm.hidden_size, *rows, None, rkm.backend)
    after = RKMState(hidden.unsqueeze(0), memory.unsqueeze(0))
    return output.transpose(0, 1) if rkm.batch_first else output, after


def _rows(state: Any, shape: tuple[int, ...]) -> tuple[bool, tuple[Tensor | None, Tensor | None]]:
    """Whether a state is a pair of tensors of this shape, or None, and its rows, ``(B, d)``."""
    if state is None:
        return True, (None, None)
    if type(state) not in (RKMState, tuple) or len(state) != 2 or getattr(state, "context", None) is not None:
        return False, (None, None)
    hidden, memory = state
    for tensor in state:
        if type(tensor) not in ORDINARY or tensor.shape != shape:
            return False, (None, None)
    return True, (hidden[0], memory[0])
