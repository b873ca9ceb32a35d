"""The short way of an RKM through a single step without gradients, as in a loop over live data.

:class:`fairseq_rkm.modules.stepping.Stepper` is shorter still. It packs weights once, and must be made anew when they
change.
"""

from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.modules.parameters import RKMParameters
from fairseq_rkm.modules.per_sample_gradients import SLOT
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.single_step import single_step
from fairseq_rkm.ops.weights import Weights


def take_step(rkm: RKMParameters, x: Any, state: Any) -> tuple[Tensor, RKMState] | None:
    """The output and the state after one step, as ``rkm(x, state)`` gives them; None where the long way must go.

    It never refuses: of what it does not know well it leaves the judgement to the long way.
    """
    if torch.is_grad_enabled() or torch.jit.is_tracing():  # a trace would warn of each comparison below
        return None
    if type(x) is not Tensor or x.dim() != 3 or type(state) not in (RKMState, tuple):
        return None
    if x.size(1 if rkm.batch_first else 0) != 1 or len(state) != 2 or rkm.backend != "auto" or not is_simple(rkm):
        return None
    hidden, memory = state
    if type(hidden) is not Tensor or type(memory) is not Tensor or not (x.is_cuda or x.is_cpu):
        return None
    rows, kind = x.size(0 if rkm.batch_first else 1), x.dtype
    wide = kind if kind.itemsize >= torch.float32.itemsize else torch.float32
    if (
        hidden.dtype is not kind
        or memory.dtype is not wide
        or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    ):
        return None
    shape = rkm.num_layers, rows, rkm.hidden_size
    if not rows or x.size(2) != rkm.input_size or hidden.shape != shape or memory.shape != shape:
        return None
    if rkm.layer_norm and kind is not wide:  # normalised in float32
        return None
    layers = [layer_weights(rkm, number) for number in range(rkm.num_layers)]
    tensors = [x, hidden, memory, *(tensor for weights in layers for tensor in weights.present())]
    if len(tensors) != 3 + len(layers) * len(rkm._kinds) or not _are_alike(tensors, x):
        return None
    output, states = x.view(rows, x.size(2)), []
    for number, weights in enumerate(layers):
        alone = slice(number, number + 1)
        before = (hidden, memory) if len(layers) == 1 else (hidden[alone], memory[alone])
        output, *after = single_step(rkm._cell, output.view(rows, -1), weights, *before)
        states.append(after)
    hidden, memory = states[0] if len(states) == 1 else map(torch.cat, zip(*states, strict=True))
    return output.view(rows, 1, -1) if rkm.batch_first else output, RKMState(hidden, memory)


def is_simple(rkm: RKMParameters) -> bool:
    """Whether a step is a step: one direction, n = 1, and nothing that training or tools change."""
    if rkm.bidirectional or rkm.ngram > 1 or rkm.proj_size or rkm.learn_sigma:
        return False
    if not rkm._cell.kernel.is_linear:
        return False
    if torch.compiler.is_compiling() or SLOT in rkm.__dict__:  # opacus has prepared this layer
        return False
    return not (rkm.training and (rkm.weight_dropout or (rkm.num_layers > 1 and rkm.dropout.p)))


def layer_weights(rkm: RKMParameters, number: int) -> Weights:
    """A layer's weights; None stands for one that is absent or computed."""
    own, cell = rkm._parameters, rkm._cell
    return Weights(
        own.get(f"weight_ih_l{number}"),  # type: ignore[arg-type]
        own.get(f"weight_hh_l{number}"),
        own.get(f"bias_l{number}"),
        own.get(f"norm_weight_l{number}"),
        own.get(f"norm_bias_l{number}"),
        rkm.sigma_i2 if cell.input_is_constant else 0.0,
        rkm.sigma_f2 if cell.forget_is_constant else 0.0,
    )


def _are_alike(tensors: list[Tensor], x: Tensor) -> bool:
    """Whether all are plain and contiguous, on the device of ``x`` and, but for the memory, of its dtype."""
    place, kind = x.get_device(), x.dtype
    for number, tensor in enumerate(tensors):
        if tensor.get_device() != place or not tensor.is_contiguous() or (number > 2 and tensor.dtype is not kind):
            return False
    return are_plain(*tensors)
