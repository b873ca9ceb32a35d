"""The short way of an RKM through a single step without gradients, as in a loop over live data.

:class:`fairseq_rkm.modules.stepping.Stepper` is shorter still. It packs weights once, and must be made anew when they
change.
"""

import functools
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
    if type(x) is not Tensor or type(state) not in (RKMState, tuple) or len(shape := x.shape) != 3 or len(state) != 2:
        return None
    steps, rows = (shape[1], shape[0]) if rkm.batch_first else shape[:2]
    if steps != 1 or not rows or shape[2] != rkm.input_size or rkm.backend != "auto" or not is_simple(rkm):
        return None
    hidden, memory = state
    if type(hidden) is not Tensor or type(memory) is not Tensor or not (x.is_cuda or x.is_cpu):
        return None
    kind = x.dtype
    wide = kind if kind.itemsize >= torch.float32.itemsize else torch.float32
    if (
        hidden.dtype is not kind
        or memory.dtype is not wide
        or torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")
    ):
        return None
    of_state = rkm.num_layers, rows, rkm.hidden_size
    if hidden.shape != of_state or memory.shape != of_state:
        return None
    if rkm.layer_norm and kind is not wide:  # normalised in float32
        return None
    layers = [layer_weights(rkm, number) for number in range(rkm.num_layers)]
    tensors = [x, hidden, memory, *(tensor for weights in layers for tensor in weights.present())]
    if len(tensors) != 3 + len(layers) * len(rkm._kinds) or not _are_alike(tensors, x) or not _fit(rkm, layers):
        return None
    output, states = x.view(rows, shape[2]), []
    for number, weights in enumerate(layers):
        alone = slice(number, number + 1)
        before = (hidden, memory) if len(layers) == 1 else (hidden[alone], memory[alone])
        output = output if output.dim() == 2 else output[0]
        output, *after = single_step(rkm._cell, output, weights, *before)
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
    return not (rkm.training and (rkm.weight_dropout or rkm.state_dropout or (rkm.num_layers > 1 and rkm.dropout.p)))


@functools.cache
def _names(number: int) -> tuple[str, ...]:
    """The names of a layer's parameters, as the first fields of :class:`Weights`."""
    return tuple(f"{kind}_l{number}" for kind in ("weight_ih", "weight_hh", "bias", "norm_weight", "norm_bias"))


def layer_weights(rkm: RKMParameters, number: int) -> Weights:
    """A layer's weights; None stands for one that is absent or computed."""
    cell = rkm._cell
    matrix, recurrent, bias, gain, shift = map(rkm._parameters.get, _names(number))
    return Weights(
        matrix,  # type: ignore[arg-type]
        recurrent,
        bias,
        gain,
        shift,
        rkm.sigma_i2 if cell.input_is_constant else 0.0,
        rkm.sigma_f2 if cell.forget_is_constant else 0.0,
    )


def _fit(rkm: RKMParameters, layers: list[Weights]) -> bool:
    """Whether the weights have the shapes that a kernel reads; PyTorch would broadcast some others."""
    cell, size, features = rkm._cell, rkm.hidden_size, rkm.input_size
    width = len(cell.gates) * size
    of_recurrent = len(cell.recurrent_gates) * size, size
    for matrix, recurrent, bias, gain, shift, *_ in layers:
        if matrix.shape != (width, features) or (recurrent is not None and recurrent.shape != of_recurrent):
            return False
        if bias is not None and bias.shape != (width,):
            return False
        if gain is not None and shift is not None and not gain.shape == shift.shape == (size,):
            return False
        features = size
    return True


def _are_alike(tensors: list[Tensor], x: Tensor) -> bool:
    """Whether all are plain and contiguous, on the device of ``x`` and, but for the memory, of its dtype."""
    place, kind = x.get_device(), x.dtype
    for tensor in tensors:
        if tensor.get_device() != place or not tensor.is_contiguous():
            return False
    for tensor in tensors[3:]:
        if tensor.dtype is not kind:
            return False
    return are_plain(*tensors)
