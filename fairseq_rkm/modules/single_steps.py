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
from fairseq_rkm.ops.weights import Weights, memory_dtype


def take_step(rkm: RKMParameters, x: Any, state: Any) -> tuple[Tensor, RKMState] | None:
    """The output and the state after one step, as ``rkm(x, state)`` gives them; None where the long way must go.

    It never refuses: of what it does not know well it leaves the judgement to the long way.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or x.dim() != 3 or not isinstance(state, tuple):
        return None
    if x.size(1 if rkm.batch_first else 0) != 1 or len(state) != 2 or not _is_simple(rkm):
        return None
    hidden, memory = state
    if type(hidden) is not Tensor or type(memory) is not Tensor:
        return None
    rows = x.view(x.size(0) if rkm.batch_first else x.size(1), x.size(2)) if x.is_contiguous() else None
    if rows is None or x.size(2) != rkm.input_size or torch.is_autocast_enabled(x.device.type):
        return None
    shape = rkm.num_layers, rows.size(0), rkm.hidden_size
    if hidden.shape != shape or memory.shape != shape or not rows.size(0):
        return None
    layers = None if rkm.layer_norm and x.dtype.itemsize < 4 else _layers(rkm, x)  # normalised in float32
    if layers is None or hidden.dtype != x.dtype or memory.dtype != memory_dtype(x.dtype):
        return None
    if hidden.device != x.device or memory.device != x.device:
        return None
    if not are_plain(x, hidden, memory, *(tensor for weights in layers for tensor in weights[:5])):
        return None
    hiddens: list[Tensor] = []
    memories: list[Tensor] = []
    output = rows
    for number, weights in enumerate(layers):
        before = hidden[number].contiguous(), memory[number].contiguous()
        output, after, kept = single_step(rkm._cell, output, weights, *before)
        hiddens.append(after)
        memories.append(kept)
    after_all, kept_all = (t[0].unsqueeze(0) if len(t) == 1 else torch.stack(t) for t in (hiddens, memories))
    return output.unsqueeze(1 if rkm.batch_first else 0), RKMState(after_all, kept_all)


def _is_simple(rkm: RKMParameters) -> bool:
    """Whether a step is a step: one direction, n = 1, and nothing that training, tools or a named backend change."""
    if rkm.bidirectional or rkm.ngram > 1 or rkm.proj_size or rkm.learn_sigma or rkm.backend != "auto":
        return False
    if torch.compiler.is_compiling() or SLOT in rkm.__dict__:  # opacus has prepared this layer
        return False
    return not (rkm.training and (rkm.weight_dropout or (rkm.num_layers > 1 and rkm.dropout.p)))


def _layers(rkm: RKMParameters, x: Tensor) -> list[Weights] | None:
    """Each layer's weights; None if one is computed, or is not what ``x`` is."""
    own, layers = rkm._parameters, []
    for number in range(rkm.num_layers):
        names: dict[str, Any] = {kind: own.get(f"{kind}_l{number}") for kind in rkm._kinds}
        for tensor in names.values():
            if tensor is None or tensor.device != x.device or tensor.dtype != x.dtype or not tensor.is_contiguous():
                return None
        find = names.get
        layers.append(
            Weights(
                names["weight_ih"], find("weight_hh"), find("bias"), find("norm_weight"), find("norm_bias"),
                rkm.sigma_i2, rkm.sigma_f2,
            )
        )  # fmt: skip
    return layers
