"""The short way of an RKM through a few steps without gradients, as in a loop over live data.

:class:`fairseq_rkm.modules.stepping.Stepper` packs weights once, and must be made anew when they change. Here they are
found and checked at each call.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.modules.parameters import RKMParameters
from fairseq_rkm.modules.per_sample_gradients import SLOT
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.few_steps import Way, way_for
from fairseq_rkm.ops.plain_tensors import ORDINARY, is_followed, is_ready
from fairseq_rkm.ops.weights import Weights

Shape = tuple[int, ...]


def take_steps(rkm: RKMParameters, x: Any, state: Any) -> tuple[Tensor, RKMState] | None:
    """The output and the state after a few steps, as ``rkm(x, state)`` gives them; None where the long way must go.

    It never refuses: of what it does not know well it leaves the judgement to the long way.
    """
    # Asked first: a trace would warn of each comparison below.
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_followed():
        return None
    way = _way(rkm, x)
    if way is None:
        return None
    kind, place = x.dtype, x.get_device()
    try:
        known, hidden, memory = _state_before(rkm, x, state)
        layers = _layers(rkm, kind, place)
        if not known or layers is None or not is_ready(x, x.shape, kind, place):
            return None
    except RuntimeError:  # a tensor has no storage
        return None
    output, hidden, memory = way(rkm._cell, x, layers, hidden, memory, rkm.batch_first)
    return output, RKMState(hidden, memory)


def _way(rkm: RKMParameters, x: Any) -> Way | None:
    """The function that takes these steps."""
    if type(x) not in ORDINARY or rkm.backend != "auto" or not is_simple(rkm):
        return None
    shape, cuda = x.shape, x.is_cuda
    if len(shape) != 3 or shape[2] != rkm.input_size or not (cuda or x.is_cpu):
        return None
    if torch.is_autocast_enabled("cuda" if cuda else "cpu"):
        return None
    layers = rkm.num_layers
    if layers > 1 and rkm.wavefront is not None:  # they are to run side by side
        return None
    return way_for(rkm._cell, layers, shape, rkm.batch_first, rkm.hidden_size, x.dtype, cuda, rkm.layer_norm)


def _state_before(rkm: RKMParameters, x: Tensor, state: Any) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether a state is as kernels read it, and its tensors; None for zeros."""
    if state is None:
        return not rkm.learn_initial_state, None, None
    if ((type(state) is not RKMState or state.context is not None) and type(state) is not tuple) or len(state) != 2:
        return False, None, None
    hidden, memory = state
    kind, place = x.dtype, x.get_device()
    wide = kind if kind.itemsize >= torch.float32.itemsize else torch.float32
    shape = rkm.num_layers, x.size(0 if rkm.batch_first else 1), rkm.hidden_size
    return is_ready(hidden, shape, kind, place) and is_ready(memory, shape, wide, place), hidden, memory


def _layers(rkm: RKMParameters, kind: torch.dtype, place: int) -> list[Weights] | None:
    """The layers' weights; None if not all are as kernels read them."""
    layers, features, size = [], rkm.input_size, rkm.hidden_size
    for number in range(rkm.num_layers):
        weights = layer_weights(rkm, number)
        shapes = _shapes(rkm._cell, size, features, rkm.bias, rkm.layer_norm)
        for tensor, shape in zip(weights, shapes, strict=False):
            if tensor is not shape and not is_ready(tensor, shape, kind, place):  # both may be None
                return None
        layers.append(weights)
        features = size
    return layers


@functools.lru_cache(maxsize=256)
def _shapes(cell: Cell, size: int, features: int, bias: bool, norm: bool) -> tuple[Shape | None, ...]:
    """The shapes of the first fields of :class:`Weights`, as kernels read them; PyTorch would broadcast some others."""
    width = len(cell.gates) * size
    of_norm = (size,) if norm else None
    return (
        (width, features), (len(cell.recurrent_gates) * size, size) if cell.has_feedback else None,
        (width,) if bias else None, of_norm, of_norm,
    )  # fmt: skip


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
