"""The two launches of ``persistent.cu``: their kernels, workspaces and arguments."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.persistent.plan import TILE, KernelPlan, Plan, Problem, plan_for
from fairseq_rkm.ops.batch_rounding import round_up
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights

SOURCE = Path(__file__).with_name("persistent.cu")
KERNELS = {"forward": "recurrence_forward", "backward": "recurrence_backward"}


class Ring(NamedTuple):
    """How published values are held.

    Attributes:
        buffers: the steps whose values are held at a time.
        marked: the steps after which a block marks its parts of as many buffers as missing, and fences.
    """

    buffers: int
    marked: int


FEW_FENCES, MANY_FENCES = Ring(buffers=8, marked=4), Ring(buffers=4, marked=1)
"""On an H200 a step forward and backward takes 0.46 us less with the first, in the median of 70 plans. It takes 0.2 to
0.5 us more where one group of 128 blocks publishes 8 bytes at a time for up to 8 rows (d = 1536 in 16 bits)."""
MANY_SLICES = 96
"""A group of so many blocks or more, with 8 bytes at a time and up to 8 rows, has the second. Of groups with 8 bytes
at a time, none of 33 to 127 blocks was measured."""


class States(NamedTuple):
    """The results of the forward launch.

    ``hiddens`` and ``memories`` hold all h and c, ``(T + 1, B, d)``, the initial ones first. ``last_hidden`` and
    ``last_memory`` are the final ones, ``(B, d)``. ``moments`` holds the layer norm's means and reciprocal deviations,
    ``(T, B, 2)``; None without it.
    """

    hiddens: Tensor
    memories: Tensor
    last_hidden: Tensor
    last_memory: Tensor
    moments: Tensor | None


class Gradients(NamedTuple):
    """The backward launch's gradients: the gates', the initial state's, and each row's share of the parameters'.

    ``first`` holds those of the initial hidden state and memory, ``(2, B, d)``.
    """

    gates: Tensor
    first: Tensor
    gain: Tensor | None
    shift: Tensor | None
    scale_i: Tensor | None
    scale_f: Tensor | None


class Launch(NamedTuple):
    """All of a launch that a problem's sizes decide.

    Attributes:
        kernel: the compiled kernel.
        blocks: the blocks of a launch.
        threads: the threads of a block.
        words: the 32-bit words of workspace of a launch.
        rows: the rows of a group.
        starts: the first row of each launch.
    """

    kernel: nvrtc.Kernel
    blocks: int
    threads: int
    words: int
    rows: int
    starts: tuple[int, ...]


class PassLaunch:
    """One of the two kernels, set up for a recurrence on a GPU.

    Args:
        direction: ``"forward"`` or ``"backward"``.
        cell: the cell.
        inputs: extended inputs.
        weights: the weights.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
    """

    def __init__(self, direction: str, cell: Cell, inputs: Tensor, weights: Weights, keep: Tensor | None) -> None:
        if weights.recurrent is None:
            raise TypeError("a problem that was refused")
        self.weights, self.recurrent = weights, weights.recurrent.contiguous()
        self.size, self.norm = self.recurrent.size(1), weights.norm_weight is not None
        self.keep = None if keep is None else keep.contiguous().view(torch.uint8)
        self.scale_f = self._scale(weights.sigma_f, self.size) if cell.forget_is_constant else None
        self.scale_i = self._scale(weights.sigma_i, 1) if cell.input_is_constant else None
        self.launch = prepare(
            direction, cell, self.size, inputs.size(1), inputs.dtype, self.norm, keep is not None, inputs.device.index
        )

    def _scale(self, value: Tensor | float, count: int) -> Tensor:
        return torch.ones(count, device=self.recurrent.device) * value

    def workspace(self) -> Tensor:
        """Memory for the values that the kernel's blocks publish; clear it (``clear_and_align``) before the launch."""
        return self.recurrent.new_empty((len(self.launch.starts), self.launch.words), dtype=torch.int32)

    def forward(self, gates: Tensor, hidden: Tensor | None, memory: Tensor | None, workspace: Tensor) -> States:
        """Turn ``W X``, without the bias, into activated gates, in place; None is an initial state of zeros."""
        steps, batch, _ = gates.shape
        size = self.size
        hiddens = gates.new_empty((steps + 1, batch, size))
        memories = gates.new_empty((steps + 1, batch, size), dtype=torch.float32)
        last_hidden, last_memory = gates.new_empty((batch, size)), memories.new_empty((batch, size))
        moments = memories.new_empty((steps, batch, 2)) if self.norm else None
        first = (None if h is None else h.contiguous() for h in (hidden, memory))
        bias = None if self.weights.bias is None else self.weights.bias.contiguous()
        given = (bias, self.recurrent, *first, last_hidden, last_memory, hiddens, memories)
        norm = (self.weights.norm_weight, self.weights.norm_bias, moments)
        self._run(gates, given, norm, workspace)
        return States(hiddens, memories, last_hidden, last_memory, moments)

    def backward(
        self, gates: Tensor, memory: Tensor, moments: Tensor | None, grad_output: Tensor | None,
        grad_hidden: Tensor | None, grad_memory: Tensor | None, workspace: Tensor,
    ) -> Gradients:  # fmt: skip
        """The gradients of all but weights and inputs; None for a given gradient stands for zeros."""
        grad_output = None if grad_output is None else grad_output.contiguous()
        last = [None if g is None else g.float().contiguous() for g in (grad_hidden, grad_memory)]
        _, batch, size = memory.shape
        first = memory.new_empty((2, batch, size))
        grad_gates = torch.empty_like(gates)
        wanted = (self.norm, self.norm, self.scale_i is not None, self.scale_f is not None)
        shares = [memory.new_empty((batch, size)) if want else None for want in wanted]
        given = (self.recurrent, memory, grad_output, *last, *nvrtc.addresses(first), grad_gates)
        norm = (self.weights.norm_weight, self.weights.norm_bias, moments, *shares)
        self._run(gates, given, norm, workspace)
        return Gradients(grad_gates, first, *shares)

    def _run(
        self, gates: Tensor, given: tuple[Tensor | int | None, ...], norm: tuple[Tensor | None, ...], workspace: Tensor
    ) -> None:
        """Run the kernel on each part of the batch."""
        (steps, batch, _), launch = gates.shape, self.launch
        alone = len(launch.starts) == 1
        for i, start in enumerate(launch.starts):
            part = workspace if alone else workspace[i]
            launch.kernel.launch(
                launch.blocks, launch.threads, gates, *given, part, self.keep, *norm, self.scale_f, self.scale_i, steps,
                start, launch.rows, batch,
            )  # fmt: skip


@functools.cache
def prepare(
    direction: str, cell: Cell, size: int, batch: int, dtype: torch.dtype, norm: bool, mask: bool, device: int
) -> Launch:
    """All of a launch that sizes and dtypes decide."""
    problem = Problem(cell, size, round_up(batch), dtype, norm, device)
    plan = plan_for(problem)
    if plan is None:
        raise TypeError("a problem that was refused")
    kernel, threads, words = _compiled(problem, plan, mask, direction)
    rows = plan.rows_for(batch)
    starts = tuple(i * plan.groups * rows for i in range(plan.launches(batch)))
    return Launch(kernel, plan.blocks, threads, words, rows, starts)


def ring_of(plan: Plan) -> Ring:
    """How a plan's kernels hold published values."""
    polled = plan.words == 2 and plan.rows <= TILE and plan.slices >= MANY_SLICES
    return MANY_FENCES if polled else FEW_FENCES


def _compiled(problem: Problem, plan: Plan, mask: bool, direction: str) -> tuple[nvrtc.Kernel, int, int]:
    """A compiled kernel, the threads of a block, and the 32-bit words of workspace of a launch."""
    launch = plan.forward if direction == "forward" else plan.backward
    macros = _macros(problem, plan, launch, mask, direction == "backward")
    kernel = nvrtc.compile_kernel(SOURCE, KERNELS[direction], macros, launch.shared, problem.device, launch.cluster)
    values = plan.slices * plan.units * (len(problem.cell.recurrent_gates) if direction == "backward" else 1)
    row = launch.cluster * -(-values // launch.cluster * problem.dtype.itemsize // 64) * 64
    published = ring_of(plan).buffers * plan.groups * plan.rows * row
    exchanged = 2 * plan.blocks * plan.rows * 16 if problem.norm else 0
    return kernel, launch.warps * 32, (published + exchanged) // 4


def _macros(
    problem: Problem, plan: Plan, launch: KernelPlan, mask: bool, backward: bool
) -> tuple[tuple[str, int | str], ...]:
    """The cell, the dtypes and the plan as macros of ``persistent.cu``."""
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
        ("RING", ring_of(plan).buffers),
        ("MARKED", ring_of(plan).marked),
        ("MAX_PASS_TILES", launch.pass_tiles),
        ("FOLD", int(launch.fold)),
    )
