"""Spread a layer over a GPU's multiprocessors by the plan with the lowest estimated time."""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.batch_rounding import round_up
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.weights import Weights

EMPTY = Path(__file__).with_name("empty.cu")
CLUSTERS = (2, 4, 8)
"""Sizes of clusters to choose from, beside 1."""
TILE = 8
"""The rows of a tile, and of the smallest plan."""
REGISTERS = {8: 255, 16: 128}
"""The registers of a thread, by the number of warps in a block."""


class StepParts(NamedTuple):
    """The parts of a kernel's step: their numbers, or the microseconds of one of each.

    Attributes:
        step: the step itself.
        products: tens of products of 16 x 8 x a chunk in a warp.
        tiles: tens of tiles of 16 x 8 sums.
        pairs: (unit, row) pairs of a thread.
        passes: passes.
        fetched: MB that all blocks fetch.
        rounds: rounds of fetching, each as large as registers allow.
        cluster_passes: passes with clusters; 0 without.
        handed_over: thousands of sums that a block hands over in a pass with clusters; 0 without.
    """

    step: float
    products: float
    tiles: float
    pairs: float
    passes: float
    fetched: float
    rounds: float
    cluster_passes: float
    handed_over: float

    def times(self, amounts: "StepParts") -> float:
        """The microseconds of ``amounts``; ``self`` holds the microseconds of one of each."""
        return sum(cost * amount for cost, amount in zip(self, amounts, strict=True))


COST = {
    ("forward", 8): StepParts(
        step=0.0, products=0.07, tiles=0.69, pairs=0.3, passes=0.54, fetched=0.23, rounds=1.16,
        cluster_passes=0.0, handed_over=0.0,
    ),
    ("forward", 16): StepParts(
        step=0.0, products=0.0, tiles=1.28, pairs=0.0, passes=0.4, fetched=0.34, rounds=1.75,
        cluster_passes=0.0, handed_over=0.0,
    ),
    ("backward", 8): StepParts(
        step=0.73, products=0.34, tiles=0.31, pairs=0.46, passes=0.4, fetched=0.24, rounds=0.0,
        cluster_passes=0.3, handed_over=0.28,
    ),
    ("backward", 16): StepParts(
        step=0.72, products=0.91, tiles=0.34, pairs=0.44, passes=0.4, fetched=0.09, rounds=0.0,
        cluster_passes=0.3, handed_over=0.28,
    ),
}  # fmt: skip
"""The microseconds of one of each part, by kernel and warps.

Fitted to 480 measurements on an H100 (d 256 to 1150, B 8 to 256, 16 and 32 bits); the median error is some 6%. Since
then fewer fences save 0.4 us a step, 0.1 to 0.7 us in small plans on an H200; the first parts are smaller by this.
"""
NORM_COST, NORM_TILE_COST = 0.6, 1.2
"""The microseconds that layer normalisation adds to a kernel's step, and those for each tile of 8 rows of a block.

Fitted to layers of 512 and 1024 units with B = 64 on an H200, in 16 and 32 bits: 1 to 8 tiles.
"""


class KernelPlan(NamedTuple):
    """The plan of one of the two kernels.

    Attributes:
        warps: warps in a block.
        cluster: blocks that share the values they read; 1 forward.
        vectors: 16-byte vectors that a lane fetches at a time.
        held: pairs of a chunk and a tile of weights that a warp keeps in registers.
        pass_tiles: tiles of 8 rows whose sums the warps exchange at a time.
        fold: half of the warps first add the others' sums to their own; this halves the shared memory for sums.
        shared: bytes of shared memory.
    """

    warps: int
    cluster: int
    vectors: int
    held: int
    pass_tiles: int
    fold: bool
    shared: int


@dataclass(frozen=True)
class Plan:
    """The plan of a layer on a GPU: ``groups`` times ``slices`` blocks, one on each multiprocessor.

    Attributes:
        units: the units of a block.
        words: 32-bit words that neighbouring units publish at once, 2 or 4.
        slices: blocks that share a layer's units.
        groups: independent parts of the batch in a launch.
        rows: the most rows of the batch in a group.
        forward: the forward kernel.
        backward: the backward kernel.
        launch_time: the estimated microseconds of a step, forward and backward, of one launch.
    """

    units: int
    words: int
    slices: int
    groups: int
    rows: int
    forward: KernelPlan
    backward: KernelPlan
    launch_time: float

    @property
    def blocks(self) -> int:
        return self.groups * self.slices

    def launches(self, batch: int) -> int:
        """The number of launches that a batch takes."""
        return -(-batch // (self.groups * self.rows))

    def step_time(self, batch: int) -> float:
        """The estimated microseconds of a step, forward and backward, for a batch."""
        return self.launch_time * self.launches(batch)

    def rows_for(self, batch: int) -> int:
        """The rows of each group of each launch; the last groups have fewer, or none."""
        return -(-batch // (self.groups * self.launches(batch)))


@functools.cache
def make_plan(
    recurrent: int, size: int, batch: int, element: int, norm: bool, room: tuple[tuple[int, int], ...], shared: int
) -> Plan | None:
    """The plan with the lowest estimated time, or None if a layer's weights do not fit on the chip.

    Args:
        recurrent: the number of recurrent gates.
        size: d.
        batch: B or more.
        element: bytes of an element.
        norm: whether the memory is normalised.
        room: pairs of a cluster's size and the number of blocks in clusters of this size that the GPU holds at a time.
        shared: bytes of shared memory that a block can have.
    """
    best, best_cost = None, float("inf")
    step = 8 // element
    for (cluster, blocks), units in itertools.product(room, range(step, size + step, step)):
        if units * size * element > shared:
            continue
        words = 2 if units * element % 16 else 4
        slices = -(-size // (units * cluster)) * cluster
        # Vectors of 16 bytes must be published whole: of h and of the gates' gradients.
        while slices * units * element % 16 or slices // cluster * recurrent * units * element % 16:
            slices += cluster
        for groups in range(1, min(blocks // slices, -(-batch // 8)) + 1):
            for rows in _row_choices(batch, groups):
                common = (units, groups * slices, rows, element, norm)
                ahead = _Work("forward", 1, recurrent * units, slices * units, *common)
                back = _Work("backward", cluster, cluster * units, slices // cluster * recurrent * units, *common)
                kernels = [_fastest(work, shared) for work in (ahead, back)]
                if None in kernels:
                    continue
                (forward, cost), (backward, more) = kernels  # type: ignore[misc]
                plan = Plan(units, words, slices, groups, rows, forward, backward, cost + more)
                if (cost + more) * plan.launches(batch) < best_cost:
                    best, best_cost = plan, (cost + more) * plan.launches(batch)
    return best


def _row_choices(batch: int, groups: int) -> list[int]:
    """The choices for a group's rows: the whole batch in one launch, or several launches of full tiles."""
    whole = -(-batch // groups)
    return [whole, *(rows for rows in (64, 48, 40, 32, 24, 16, 8) if rows < whole)]


class _Work(NamedTuple):
    """A block's work in a step: a product ``(m, k)`` by ``(k, rows)``, and the equations of its units and rows."""

    name: str
    cluster: int
    m: int
    k: int
    units: int
    blocks: int
    rows: int
    element: int
    norm: bool

    @property
    def tiles(self) -> tuple[int, int, int]:
        """The numbers of tiles of 16 rows of weights, tiles of 8 rows of the batch, and 64-byte chunks of k."""
        return -(-self.m // 16), -(-self.rows // 8), -(-self.k * self.element // 64)


def _fastest(work: _Work, shared: int) -> tuple[KernelPlan, float] | None:
    """The fastest plan for a kernel's work, and its estimated microseconds."""
    launches = [_arrange(work, warps, fold, shared) for warps in REGISTERS for fold in (False, True)]
    times = [(launch, _time(work, launch)) for launch in launches if launch is not None]
    return min(times, key=lambda pair: pair[1], default=None)


def _arrange(work: _Work, warps: int, fold: bool, shared: int) -> KernelPlan | None:
    """The plan with the fewest passes, of equal size, and the most vectors at a time; None if there is no room."""
    m_tiles, tiles, chunks = work.tiles
    slots, handed = warps // 2 if fold else warps, 2 * work.m if work.cluster > 1 else 0
    fixed = work.m * (chunks | 1) * 64 + ((work.rows * work.units + work.rows) * 8 if work.norm else 0) + 16
    tile = (slots * (m_tiles * 16 + 4) + handed) * 8 * 4
    most = (shared - fixed) // tile
    if most < 1:
        return None
    pass_tiles = -(-tiles // -(-tiles // most))
    items = _items(work, warps, pass_tiles)
    share = -(-chunks // warps)
    # The compiler showed a thread's further registers: few plans spill, and these spill little.
    free = REGISTERS[warps] - 28 - 4 * m_tiles * tiles - 10 * items
    vectors = min(share * tiles, free // 4, 24)
    if vectors < tiles:
        return None
    spare = free - 4 * vectors - (48 if work.norm else 16)
    held = min(share * m_tiles, max(0, spare) // 8) if vectors == share * tiles else 0
    return KernelPlan(warps, work.cluster, vectors, held, pass_tiles, fold, fixed + tile * pass_tiles)


def _items(work: _Work, warps: int, pass_tiles: int) -> int:
    """The (unit, row) pairs of a thread."""
    return -(-work.tiles[1] // pass_tiles) * -(-work.units * pass_tiles * 8 // (warps * 32))


def _time(work: _Work, launch: KernelPlan) -> float:
    """The estimated microseconds of a step, by :data:`COST`."""
    m_tiles, tiles, chunks = work.tiles
    items, passes = _items(work, launch.warps, launch.pass_tiles), -(-tiles // launch.pass_tiles)
    share = -(-chunks // launch.warps)
    fetched = work.blocks * work.rows * chunks * 64
    rounds = -(-share // min(share, launch.vectors // tiles))
    clusters = work.cluster > 1
    amounts = StepParts(
        step=1,
        products=share * m_tiles * tiles / 10,
        tiles=m_tiles * tiles / 10,
        pairs=items,
        passes=passes,
        fetched=fetched / 1e6,
        rounds=rounds,
        cluster_passes=clusters * passes,
        handed_over=clusters * work.m * work.rows / 1e3,
    )
    norm = NORM_COST + NORM_TILE_COST * tiles if work.norm else 0.0
    return COST[work.name, launch.warps].times(amounts) + norm


class Problem(NamedTuple):
    """The inputs of plan and kernels, without the number of steps, and with the batch rounded by :func:`round_up`."""

    cell: Cell
    size: int
    batch: int
    dtype: torch.dtype
    norm: bool
    device: int

    @classmethod
    def of(cls, cell: Cell, inputs: Tensor, weights: Weights) -> "Problem":
        """The problem of a recurrence with feedback on a GPU."""
        size = weights.recurrent.size(1) if weights.recurrent is not None else 0
        batch = inputs.size(1)
        # A batch is a variable to torch.compile, which asks whether there is a plan: for all batches, or for none.
        batch = round_up(batch) if isinstance(batch, int) else TILE
        return cls(cell, size, batch, inputs.dtype, weights.norm_weight is not None, inputs.device.index)


@functools.cache
def plan_for(problem: Problem) -> Plan | None:
    """:func:`make_plan` for a problem's GPU; None if that is too old or cannot hold the weights."""
    properties = torch.cuda.get_device_properties(problem.device)
    if properties.major < 8:
        return None
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return make_plan(
        len(problem.cell.recurrent_gates), problem.size, problem.batch, problem.dtype.itemsize, problem.norm,
        _room(problem.device), shared,
    )  # fmt: skip


@functools.cache
def _room(device: int) -> tuple[tuple[int, int], ...]:
    """For each size of cluster, the blocks that a GPU holds at a time in clusters of it, one a multiprocessor."""
    properties = torch.cuda.get_device_properties(device)
    room = [(1, properties.multi_processor_count)]
    if properties.major >= 9:
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        for cluster in CLUSTERS:
            kernel = nvrtc.compile_kernel(EMPTY, "empty", (), shared, device, cluster)
            room.append((cluster, cluster * kernel.most_clusters(32 * max(REGISTERS))))
    return tuple(room)
