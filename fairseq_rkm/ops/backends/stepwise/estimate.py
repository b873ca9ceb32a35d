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


class JoinedCost(NamedTuple):
    """The parts of a step of one kernel.

    Attributes:
        fixed: microseconds of two launches.
        cached: the terabytes a second of weights that stay in the second-level cache.
        uncached: the same for others.
        room: the bytes of a pass's weights that stay there.
        rows: microseconds for more rows than one.
        teraflops: the rate of their products.
    """

    fixed: float
    cached: float
    uncached: float
    room: int
    rows: float
    teraflops: float


JOINED = {
    2: JoinedCost(fixed=4.2, cached=4.6, uncached=3.3, room=50_000_000, rows=3.5, teraflops=7.7),
    4: JoinedCost(fixed=4.05, cached=5.3, uncached=3.3, room=50_000_000, rows=3.5, teraflops=7.7),
}
"""By the bytes of an element.

By 38 graphs of layers with d = 256 to 3072, B = 1 and, of float32, 8 on an H200: off by 12% in the median. 256 units
with one row are 23 to 35% faster: where both are near, ``persistent`` is less work for the host.
"""
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
        return _joined_time(batch, len(cell.recurrent_gates) * size * size, inputs.dtype.itemsize)
    cost = RATES.get(inputs.dtype.itemsize, RATES[torch.float32.itemsize])
    operations = 2 * 2 * batch * len(cell.recurrent_gates) * size * size
    norm = NORM_TIME if weights.norm_weight is not None else 0.0
    kernel = 0.0 if cell.kernel.is_linear else KERNEL_TIME
    return cost.fixed + cost.unit * size + operations / (cost.teraflops * 1e6) + norm + kernel


def _joined_time(batch: int, weights: int, itemsize: int) -> float:
    """The estimate of a step of one kernel."""
    cost, bytes_ = JOINED[itemsize], weights * itemsize
    rate = cost.cached if bytes_ <= cost.room else cost.uncached
    rows = cost.rows + 2 * 2 * (batch - 1) * weights / (cost.teraflops * 1e6) if batch > 1 else 0.0
    return cost.fixed + 2 * bytes_ / (rate * 1e6) + rows
