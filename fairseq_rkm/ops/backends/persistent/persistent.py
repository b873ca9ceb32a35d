"""On GPUs, with feedback: one launch for a whole sequence, the recurrent weights on the chip (``persistent.cu``).

What does not depend on ``h_{t-1}`` (projections of the inputs, gradients of the weights) is one matrix product over all
steps, as in :mod:`fairseq_rkm.ops.backends.batched`. Here stand the plan, that is how a layer is spread over the
multiprocessors, and the two launches.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.alignment import clear_and_align
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.gradients import parameter_gradients, product_operands
from fairseq_rkm.ops.higher_derivatives import Saved, first_derivatives, save_arguments
from fairseq_rkm.ops.ngram import project
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights

SOURCE = Path(__file__).with_suffix(".cu")
EMPTY = SOURCE.with_name("empty.cu")
CLUSTERS = (2, 4, 8)
"""Sizes of clusters to choose from, beside 1."""
REGISTERS = {8: 255, 16: 128}
"""What a thread can have, by the number of warps in a block."""
COST = {
    ("forward", 8): (0.17, 0.07, 0.69, 0.3, 0.54, 0.23, 1.16, 0.0, 0.0),
    ("forward", 16): (0.0, 0.0, 1.28, 0.0, 0.4, 0.34, 1.75, 0.0, 0.0),
    ("backward", 8): (0.96, 0.34, 0.31, 0.46, 0.4, 0.24, 0.0, 0.3, 0.28),
    ("backward", 16): (0.95, 0.91, 0.34, 0.44, 0.4, 0.09, 0.0, 0.3, 0.28),
}
"""Microseconds of a step, by kernel and warps, for each of: one step; ten products of 16 x 8 x a chunk in a warp; ten
tiles of 16 x 8 sums; a (unit, row) pair of a thread; a pass; 1 MB that all blocks fetch; a round of fetching, with as
much under way as registers allow; where there are clusters, a pass, and a thousand sums that a block hands over in it.
From 480 measurements on an H100 (d 256 to 1150, B 8 to 256, both widths of elements); within some 6%, in the median."""


class Launch(NamedTuple):
    """One of the two kernels.

    Attributes:
        warps: in a block.
        cluster: blocks that share what they read; 1 forward.
        vectors: of 16 bytes that a lane has on their way to it at a time.
        held: pairs of a chunk and a tile of weights that a warp keeps in registers.
        pass_tiles: tiles of 8 rows whose sums the warps exchange at a time.
        fold: whether half of the warps add the others' sums to their own first, which takes half the room.
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
    """How a layer is spread over a GPU: ``groups`` times ``slices`` blocks, one a multiprocessor.

    Attributes:
        units: a block's units.
        words: of 32 bits that neighbouring units publish at once, 2 or 4.
        slices: blocks that share a layer's units.
        groups: independent parts of the batch in a launch.
        rows: of the batch in a group, at most.
        forward: the forward kernel.
        backward: the backward kernel.
    """

    units: int
    words: int
    slices: int
    groups: int
    rows: int
    forward: Launch
    backward: Launch

    @property
    def blocks(self) -> int:
        return self.groups * self.slices

    def launches(self, batch: int) -> int:
        """The number of launches that a batch takes."""
        return -(-batch // (self.groups * self.rows))

    def rows_for(self, batch: int) -> int:
        """The rows of a batch that each group of each launch has; the last ones have fewer, or none."""
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
        room: sizes of clusters, and how many blocks in such clusters the GPU holds at a time.
        shared: bytes of shared memory that a block can have.
    """
    best, best_cost = None, float("inf")
    step = 8 // element
    for (cluster, blocks), units in itertools.product(room, range(step, size + step, step)):
        if units * size * element > shared:
            continue
        words = 2 if units * element % 16 else 4
        slices = -(-size // (units * cluster)) * cluster
        # All vectors of 16 bytes must be published whole, of h as of the gates' gradients.
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
                plan = Plan(units, words, slices, groups, rows, forward, backward)
                if (cost + more) * plan.launches(batch) < best_cost:
                    best, best_cost = plan, (cost + more) * plan.launches(batch)
    return best


def _row_choices(batch: int, groups: int) -> list[int]:
    """Rows of a group: all of the batch in one launch, or what several launches of full tiles take."""
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
        """Of 16 rows of weights; of 8 rows of the batch; 64-byte chunks of k."""
        return -(-self.m // 16), -(-self.rows // 8), -(-self.k * self.element // 64)


def _fastest(work: _Work, shared: int) -> tuple[Launch, float] | None:
    """The fastest way to do it, and the microseconds that it should take."""
    launches = [_arrange(work, warps, fold, shared) for warps in REGISTERS for fold in (False, True)]
    times = [(launch, _time(work, launch)) for launch in launches if launch is not None]
    return min(times, key=lambda pair: pair[1], default=None)


def _arrange(work: _Work, warps: int, fold: bool, shared: int) -> Launch | None:
    """The fewest passes, of equal size, and the most vectors under way for which there is room."""
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
    # What a thread needs besides was found with the compiler: few plans spill, and those little.
    free = REGISTERS[warps] - 28 - 4 * m_tiles * tiles - 10 * items
    vectors = min(share * tiles, free // 4, 24)
    if vectors < tiles:
        return None
    spare = free - 4 * vectors - (48 if work.norm else 16)
    held = min(share * m_tiles, max(0, spare) // 8) if vectors == share * tiles else 0
    return Launch(warps, work.cluster, vectors, held, pass_tiles, fold, fixed + tile * pass_tiles)


def _items(work: _Work, warps: int, pass_tiles: int) -> int:
    """(unit, row) pairs of a thread."""
    return -(-work.tiles[1] // pass_tiles) * -(-work.units * pass_tiles * 8 // (warps * 32))


def _time(work: _Work, launch: Launch) -> float:
    """Microseconds that a step should take, by :data:`COST`."""
    m_tiles, tiles, chunks = work.tiles
    items, passes = _items(work, launch.warps, launch.pass_tiles), -(-tiles // launch.pass_tiles)
    share = -(-chunks // launch.warps)
    fetched = work.blocks * work.rows * chunks * 64
    rounds = -(-share // min(share, launch.vectors // tiles))
    clusters = work.cluster > 1
    amounts = (
        1, share * m_tiles * tiles / 10, m_tiles * tiles / 10, items, passes, fetched / 1e6, rounds,
        clusters * passes, clusters * work.m * work.rows / 1e3,
    )  # fmt: skip
    cost = COST[work.name, launch.warps]
    return sum(c * a for c, a in zip(cost, amounts, strict=True)) + 1.5 * work.norm


def round_up(batch: int) -> int:
    """The batch that kernels are made for: a multiple of 8 (whole tiles), beyond 64 of 16, beyond 128 of 32, and so on.

    A kernel takes a second or two to compile, so it has to serve many batches; it is told the true one at its launch.
    """
    step = max(8, 1 << (batch - 1).bit_length() >> 3)
    return -(-batch // step) * step


class Problem(NamedTuple):
    """What plan and kernels depend on: not the number of steps, and of the batch only what :func:`round_up` leaves."""

    cell: Cell
    size: int
    batch: int
    dtype: torch.dtype
    norm: bool
    device: int

    @classmethod
    def of(cls, cell: Cell, inputs: Tensor, weights: Weights) -> "Problem":
        """A recurrence with feedback on a GPU."""
        size = weights.recurrent.size(1) if weights.recurrent is not None else 0
        batch = round_up(inputs.size(1))
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
    """Sizes of clusters, and how many blocks in such clusters a GPU holds at a time, one a multiprocessor."""
    properties = torch.cuda.get_device_properties(device)
    room = [(1, properties.multi_processor_count)]
    if properties.major >= 9:
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        for cluster in CLUSTERS:
            kernel = nvrtc.compile_kernel(EMPTY, "empty", (), shared, device, cluster)
            room.append((cluster, cluster * kernel.most_clusters(32 * max(REGISTERS))))
    return tuple(room)


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """Why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda":
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is None:
        return "without feedback there is nothing to keep on the chip"
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32 (TF32), float16 and bfloat16, not in {inputs.dtype}"
    if inputs.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "its float32 products are TF32, which torch.backends.cudnn.allow_tf32 = False rules out"
    if not inputs.numel() or not inputs.size(1):
        return "it needs at least one step and one sequence"
    if plan_for(Problem.of(cell, inputs, weights)) is None:
        return (
            f"the weights of {weights.recurrent.size(1)} units do not fit on this GPU's multiprocessors, or its "
            "compute capability is below 8.0"
        )
    return nvrtc.available()


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.reference.recurrence`, and None for an initial state of zeros."""
    return _Persistent.apply(cell, keep, inputs, hidden, memory, *weights)


class _Persistent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, keep: Tensor | None, inputs: Tensor, hidden: Tensor | None, memory: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        weights = Weights(*tensors)
        ctx.problem = Problem.of(cell, inputs, weights)
        launches = _Launches(ctx.problem, weights, keep)
        workspace = launches.workspace("forward", inputs.size(1))
        given, weight = clear_and_align(workspace, inputs, weights.input)
        gates = project(given, weight, None)
        run = launches.forward(gates, hidden, memory, workspace)
        own = gates, run.hiddens, run.memories, run.moments
        save_arguments(ctx, cell, keep, inputs, hidden, memory, weights, *own)
        ctx.set_materialize_grads(False)
        output = run.hiddens[1:] if keep is None else run.hiddens[1:].masked_fill(~keep.unsqueeze(-1), 0)
        return output, run.last_hidden, run.last_memory

    @staticmethod
    @first_derivatives
    def backward(
        ctx: Any, saved: Saved, grad_output: Tensor | None, grad_hidden: Tensor | None, grad_memory: Tensor | None
    ) -> tuple[Any, ...]:
        problem, inputs, weights, (gates, hidden, memory, moments) = ctx.problem, saved.inputs, saved.weights, saved.own
        _, _, need_inputs, need_hidden, need_memory, *need_weights = ctx.needs_input_grad
        launches = _Launches(problem, weights, saved.keep)
        workspace = launches.workspace("backward", inputs.size(1))
        operands = clear_and_align(workspace, *product_operands(weights, inputs, hidden, need_weights[1]))
        grad = launches.backward(gates, memory, moments, grad_output, grad_hidden, grad_memory, workspace)
        # The kernel leaves each row's share.
        shares = {"norm_weight": grad.gain, "norm_bias": grad.shift, "sigma_f": grad.scale_f}
        known = {name: None if share is None else share.sum(0) for name, share in shares.items()}
        known["sigma_i"] = None if grad.scale_i is None else grad.scale_i.sum()
        grad_inputs, *grads = parameter_gradients(
            problem.cell, weights, inputs, hidden, memory, gates, grad.gates, known, (need_inputs, *need_weights),
            operands,
        )  # fmt: skip
        first_hidden = grad.hidden.to(hidden.dtype) if need_hidden else None
        return None, None, grad_inputs, first_hidden, grad.memory if need_memory else None, *grads


class _States(NamedTuple):
    """What the forward launch leaves.

    All h and c, ``(T + 1, B, d)``, initial ones first; the last ones, ``(B, d)``; the layer norm's means and reciprocal
    deviations, ``(T, B, 2)``, or None without.
    """

    hiddens: Tensor
    memories: Tensor
    last_hidden: Tensor
    last_memory: Tensor
    moments: Tensor | None


class _Gradients(NamedTuple):
    """What the backward launch leaves: of the gates, of the initial state, and each row's share of the parameters'."""

    gates: Tensor
    hidden: Tensor
    memory: Tensor
    gain: Tensor | None
    shift: Tensor | None
    scale_i: Tensor | None
    scale_f: Tensor | None


class _Launches:
    """The two kernels, set up for a problem."""

    def __init__(self, problem: Problem, weights: Weights, keep: Tensor | None) -> None:
        plan = plan_for(problem)
        if plan is None or weights.recurrent is None:
            raise TypeError("a problem that was refused")
        self.problem, self.plan, self.weights = problem, plan, weights
        self.recurrent, self.device = weights.recurrent.contiguous(), weights.recurrent.device
        self.keep = None if keep is None else keep.contiguous().view(torch.uint8)
        self.scale_f = self._scale(weights.sigma_f, problem.size) if problem.cell.forget_is_constant else None
        self.scale_i = self._scale(weights.sigma_i, 1) if problem.cell.input_is_constant else None

    def _scale(self, value: Tensor | float, count: int) -> Tensor:
        return torch.ones(count, device=self.device) * value

    def workspace(self, direction: str, batch: int) -> Tensor:
        """Room for what a kernel publishes, for each launch, yet to be cleared."""
        _, _, words = prepare(self.problem, self.keep is not None, direction)
        return torch.empty(self.plan.launches(batch), words, dtype=torch.int32, device=self.device)

    def forward(self, gates: Tensor, hidden: Tensor | None, memory: Tensor | None, workspace: Tensor) -> _States:
        """Turn ``W X``, the bias yet to come, into activated gates, in place; an initial state that is None is zero."""
        steps, batch, size = *gates.shape[:2], self.problem.size
        hiddens = gates.new_empty(steps + 1, batch, size)
        memories = gates.new_empty(steps + 1, batch, size, dtype=torch.float32)
        last_hidden, last_memory = gates.new_empty(batch, size), memories.new_empty(batch, size)
        moments = memories.new_empty(steps, batch, 2) if self.problem.norm else None
        first = (None if h is None else h.contiguous() for h in (hidden, memory))
        bias = None if self.weights.bias is None else self.weights.bias.contiguous()
        given = (bias, self.recurrent, *first, last_hidden, last_memory, hiddens, memories)
        norm = (self.weights.norm_weight, self.weights.norm_bias, moments)
        self._launch("forward", gates, given, norm, workspace)
        return _States(hiddens, memories, last_hidden, last_memory, moments)

    def backward(
        self, gates: Tensor, memory: Tensor, moments: Tensor | None, grad_output: Tensor | None,
        grad_hidden: Tensor | None, grad_memory: Tensor | None, workspace: Tensor,
    ) -> _Gradients:  # fmt: skip
        """The gradients of everything but weights and inputs; a gradient that is None is zero."""
        grad_output = None if grad_output is None else grad_output.contiguous()
        last = [None if g is None else g.float().contiguous() for g in (grad_hidden, grad_memory)]
        first = [torch.empty_like(memory[0]) for _ in range(2)]
        grad_gates = torch.empty_like(gates)
        wanted = (self.problem.norm, self.problem.norm, self.scale_i is not None, self.scale_f is not None)
        shares = [torch.empty_like(first[0]) if want else None for want in wanted]
        given = (self.recurrent, memory, grad_output, *last, *first, grad_gates)
        norm = (self.weights.norm_weight, self.weights.norm_bias, moments, *shares)
        self._launch("backward", gates, given, norm, workspace)
        return _Gradients(grad_gates, first[0], first[1], *shares)

    def _launch(
        self, direction: str, gates: Tensor, given: tuple[Tensor | None, ...], norm: tuple[Tensor | None, ...],
        workspace: Tensor,
    ) -> None:  # fmt: skip
        """Run a kernel on as many parts of the batch as it takes."""
        plan = self.plan
        kernel, threads, _ = prepare(self.problem, self.keep is not None, direction)
        steps, batch, _ = gates.shape
        rows = plan.rows_for(batch)
        for i in range(workspace.size(0)):
            part = workspace if workspace.size(0) == 1 else workspace[i]
            kernel.launch(
                plan.blocks, threads, gates, *given, part, self.keep, *norm, self.scale_f, self.scale_i, steps,
                i * plan.groups * rows, rows, batch,
            )  # fmt: skip


@functools.cache
def prepare(problem: Problem, mask: bool, direction: str) -> tuple[nvrtc.Kernel, int, int]:
    """A compiled kernel, the threads of its blocks, and the 32-bit words of workspace that a launch takes."""
    plan = plan_for(problem)
    if plan is None:
        raise TypeError("a problem that was refused")
    launch = plan.forward if direction == "forward" else plan.backward
    macros = _macros(problem, plan, launch, mask, direction == "backward")
    kernel = nvrtc.compile_kernel(
        SOURCE, f"recurrence_{direction}", macros, launch.shared, problem.device, launch.cluster
    )
    values = plan.slices * plan.units * (len(problem.cell.recurrent_gates) if direction == "backward" else 1)
    row = launch.cluster * -(-values // launch.cluster * problem.dtype.itemsize // 64) * 64
    published = 4 * plan.groups * plan.rows * row
    exchanged = 2 * plan.blocks * plan.rows * 16 if problem.norm else 0
    return kernel, launch.warps * 32, (published + exchanged) // 4


def _macros(
    problem: Problem, plan: Plan, launch: Launch, mask: bool, backward: bool
) -> tuple[tuple[str, int | str], ...]:
    """The cell, the types and the plan, as ``persistent.cu`` reads them."""
    return (
        *cell_macros(problem.cell).items(),
        ("NORM", int(problem.norm)),
        ("EPSILON", f"{LAYER_NORM_EPS}f"),
        ("MASK", int(mask)),
        ("ELEMENT", problem.dtype.itemsize),
        ("BF16", int(problem.dtype == torch.bfloat16)),
        ("SIZE", problem.size),
        ("UNITS", plan.units),
        ("WORDS", plan.words),
        ("SLICES", plan.slices),
        ("GROUPS", plan.groups),
        ("ROWS", plan.rows),
        ("BACKWARD", int(backward)),
        ("WARPS", launch.warps),
        ("CLUSTER", launch.cluster),
        ("VECTORS", launch.vectors),
        ("HELD", launch.held),
        ("MAX_PASS_TILES", launch.pass_tiles),
        ("FOLD", int(launch.fold)),
    )
