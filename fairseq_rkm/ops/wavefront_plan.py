"""Whether layers of a stack run side by side, and over how many stretches of time: by an estimate.

More stretches let more layers work at the same time, and each costs launches: on the GPU, where a layer waits for them,
and on the host, unless a CUDA graph is being recorded. Both orders are estimated; the plain one is left only for a
clear gain.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.backends import blockwise
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.stretches import Stretches, Way
from fairseq_rkm.ops.weights import Weights

STRETCH_ON_GPU = 43.0
"""Microseconds that a stretch of a layer takes beside its steps, forward and backward: a product's and a kernel's start
and end, and the wait for another stream. One H200, the median of 64 and 128 units, which take 20 to 78."""
STRETCH_ON_HOST, LAYER_ON_HOST, STACK_ON_HOST = 200.0, 550.0, 950.0
"""Microseconds of the host, forward and backward, for each stretch of a layer, for each layer, and for a call."""
PLAIN_LAYER_ON_HOST, PLAIN_CALL_ON_HOST = 600.0, 500.0
"""The same in the plain order. A forward pass alone has less of all of these, and the same optimum."""
GAIN = 0.9
"""The part of the plain order's time that layers side by side may take at most."""
LEAST_STEPS = 16
"""The fewest steps of a stretch."""
NUMBERS = 2, 3, 4, 6, 8, 12, 16, 24, 32
"""The numbers of stretches to choose from."""
MOST_LANES = 8
"""The most streams: a GPU's driver keeps so many apart. Layers beyond share them."""
ALIGNED_BYTES = 16
"""The rows of matrices that need no copy for fast products (:mod:`fairseq_rkm.ops.alignment`)."""


BACKEND = "blockwise"
"""The backend whose layers run side by side."""


class Plan(NamedTuple):
    """How a stack runs side by side.

    Attributes:
        chunks: the number of stretches, at most.
        rows: a :attr:`Way.rows`.
        lanes: the number of streams.
        stretches: the backend's.
    """

    chunks: int
    rows: int | None
    lanes: int
    stretches: Stretches

    def bounds(self, steps: int) -> list[tuple[int, int]]:
        """The first step of each stretch, and the step behind its last."""
        length = -(-steps // self.chunks)
        return [(start, min(start + length, steps)) for start in range(0, steps, length)]

    def lane(self, layer: int) -> int:
        """The lane of a layer, counted from 0."""
        return layer % self.lanes


class Times(NamedTuple):
    """The estimated microseconds of a stack: on the GPU, and of the host that launches it."""

    gpu: float
    host: float

    @property
    def longer(self) -> float:
        """The time of both at once."""
        return max(self)


def time_side_by_side(steps: int, layers: int, way: Way, chunks: int) -> Times:
    """The estimate of ``layers`` layers over ``chunks`` stretches of time, forward and backward."""
    beside = min(layers, way.beside, MOST_LANES)
    turns = max(chunks + layers - 1, -(-layers * chunks // beside) + beside - 1)
    host = STACK_ON_HOST + layers * (LAYER_ON_HOST + chunks * STRETCH_ON_HOST)
    return Times(turns * (steps / chunks * way.step_time + STRETCH_ON_GPU), host)


def time_in_order(steps: int, layers: int, step_time: float) -> Times:
    """The estimate of the plain order, forward and backward; ``step_time``: microseconds of a layer's step."""
    host = PLAIN_CALL_ON_HOST + layers * PLAIN_LAYER_ON_HOST
    return Times(layers * (steps * step_time + STRETCH_ON_GPU), host)


def choose(steps: int, layers: int, ways: Sequence[Way], step_time: float, host: bool) -> tuple[int, Way] | None:
    """The number of stretches and the way of least time; None for the plain order.

    Args:
        steps: T.
        layers: L.
        ways: how layers may run side by side.
        step_time: the microseconds of a step in the plain order, forward and backward.
        host: whether the host launches all of it: no CUDA graph is being recorded.
    """
    choices = [(chunks, way) for way in ways for chunks in NUMBERS if chunks * LEAST_STEPS <= steps]
    if not choices:
        return None

    def time(choice: tuple[int, Way]) -> float:
        times = time_side_by_side(steps, layers, choice[1], choice[0])
        return times.longer if host else times.gpu

    best, plain = min(choices, key=time), time_in_order(steps, layers, step_time)
    return best if time(best) <= GAIN * (plain.longer if host else plain.gpu) else None


_MADE: dict[tuple[Any, ...], Plan | None] = {}
MOST_MADE = 4096


def plan_for(
    backend: str, cell: Cell, x: Tensor, layers: int, size: int, mask: bool, chunks: int | None = None,
    recorded: bool | None = None,
) -> Plan | None:  # fmt: skip
    """The plan of a stack without layer normalisation; None for the plain order.

    Args:
        backend: ``"auto"`` or a backend's name.
        cell: the cell.
        x: the first layer's inputs, ``(T, B, m)``.
        layers: L.
        size: d.
        mask: whether steps are padding.
        chunks: the number of stretches of time; None for the estimate's.
        recorded: whether a CUDA graph is being recorded, whose launches cost the host nothing; None asks PyTorch. Code
            cannot be loaded then: only kernels that have run before are taken.
    """
    if not x.is_cuda or not x.numel() or backend not in ("auto", BACKEND) or layers < 2:
        return None
    if torch.cuda.is_current_stream_capturing() if recorded is None else recorded:
        return _make(backend, cell, x, layers, size, chunks, compiled_for=mask)
    key = (
        backend, cell.key, x.size(0), x.size(1), x.dtype, x.device.index, layers, size, chunks,
        torch.backends.cudnn.allow_tf32,
    )  # fmt: skip
    if key not in _MADE:
        if len(_MADE) >= MOST_MADE:
            _MADE.clear()
        _MADE[key] = _make(backend, cell, x, layers, size, chunks)
    return _MADE[key]


def _make(
    backend: str, cell: Cell, x: Tensor, layers: int, size: int, chunks: int | None, compiled_for: bool | None = None
) -> Plan | None:
    """``compiled_for``: with or without mask, all kernels must be there, as a graph is being recorded."""
    if not cell.has_feedback or size * x.element_size() % ALIGNED_BYTES:
        return None
    rows = len(cell.gates), len(cell.recurrent_gates)
    like = Weights(*(torch.empty(count * size, size, device="meta") for count in rows))
    if dispatch.BACKENDS[BACKEND].refuses(cell, x, like) is not None:
        return None
    step_time = dispatch.pick(backend, cell, x, like).step_time
    stretches, device = blockwise.STRETCHES, x.device.index
    ways = stretches.ways(cell, size, x.size(1), device)
    if compiled_for is not None:
        ways = [way for way in ways if stretches.are_compiled(cell, size, x.dtype, way.rows, compiled_for, device)]
    if not ways or step_time is None:
        return None
    if chunks is not None:
        best = min(ways, key=lambda way: time_side_by_side(x.size(0), layers, way, chunks).gpu)
        return Plan(chunks, best.rows, min(layers, MOST_LANES), stretches)
    choice = choose(x.size(0), layers, ways, step_time(cell, x, like), host=compiled_for is None)
    return None if choice is None else Plan(choice[0], choice[1].rows, min(layers, MOST_LANES), stretches)
