"""How long a step of ``stepwise`` takes, to be compared with a plan of ``persistent``."""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.stepwise.joined_loop import is_joined
from fairseq_rkm.ops.batch_rounding import likely
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.weights import Weights


class StepCost(NamedTuple):
    """The parts of a step, forward and backward together.

    Attributes:
        fixed: microseconds of four launches in a graph.
        unit: microseconds for each unit of the layer: the weights are fetched.
        teraflops: the rate of both products.
    """

    fixed: float
    unit: float
    teraflops: float


RATES = {2: StepCost(fixed=8.5, unit=0.0065, teraflops=700), 4: StepCost(fixed=12, unit=0.011, teraflops=180)}
"""By the bytes of an element, float32 in TF32.

Fitted to 42 graphs of layers with d = 64 to 3072, B = 1, 32 and 512 on an H200.
"""
JOINED_FIXED, JOINED_TERABYTES = 4.0, 4.0
"""Of steps of one kernel, reckoned: the microseconds of two launches, and the rate at which weights arrive."""
NORM_TIME = 3.0
"""The microseconds that layer normalisation adds."""
KERNEL_TIME = 2.0
"""The microseconds that sums over a row add for a kernel other than the linear one: by comparison with ``NORM_TIME``.

No other backend with an estimate takes such a kernel.
"""


def step_time(cell: Cell, inputs: Tensor, weights: Weights) -> float:
    """The estimated microseconds of a step, forward and backward, as a graph, on a GPU such as an H200."""
    size, batch = weights.input.size(0) // len(cell.gates), likely(inputs.size(1))
    tf32 = inputs.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    if is_joined(cell, batch, size, inputs.dtype, weights.norm_weight is not None, tf32):
        bytes_ = 2 * len(cell.recurrent_gates) * size * size * inputs.dtype.itemsize
        return JOINED_FIXED + bytes_ / (JOINED_TERABYTES * 1e6)
    cost = RATES.get(inputs.dtype.itemsize, RATES[torch.float32.itemsize])
    operations = 2 * 2 * batch * len(cell.recurrent_gates) * size * size
    norm = NORM_TIME if weights.norm_weight is not None else 0.0
    kernel = 0.0 if cell.kernel.is_linear else KERNEL_TIME
    return cost.fixed + cost.unit * size + operations / (cost.teraflops * 1e6) + norm + kernel
