"""The two launches of ``persistent.cu``: their kernels, workspaces and arguments."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.persistent.plan import KernelPlan, Plan, Problem, plan_for
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights

SOURCE = Path(__file__).with_name("persistent.cu")
KERNELS = {"forward": "recurrence_forward", "backward": "recurrence_backward"}


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
    """The backward launch's gradients: the gates', the initial state's, and each row's share of the parameters'."""

    gates: Tensor
    hidden: Tensor
    memory: Tensor
    gain: Tensor | None
    shift: Tensor | None
    scale_i: Tensor | None
    scale_f: Tensor | None


class Launches:
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
        """Memory for the values that a kernel's blocks publish; clear it (``clear_and_align``) before the launch."""
        _, _, words = prepare(self.problem, self.keep is not None, direction)
        return torch.empty(self.plan.launches(batch), words, dtype=torch.int32, device=self.device)

    def forward(self, gates: Tensor, hidden: Tensor | None, memory: Tensor | None, workspace: Tensor) -> States:
        """Turn ``W X``, without the bias, into activated gates, in place; None is an initial state of zeros."""
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
        return States(hiddens, memories, last_hidden, last_memory, moments)

    def backward(
        self, gates: Tensor, memory: Tensor, moments: Tensor | None, grad_output: Tensor | None,
        grad_hidden: Tensor | None, grad_memory: Tensor | None, workspace: Tensor,
    ) -> Gradients:  # fmt: skip
        """The gradients of all but weights and inputs; None for a given gradient stands for zeros."""
        grad_output = None if grad_output is None else grad_output.contiguous()
        last = [None if g is None else g.float().contiguous() for g in (grad_hidden, grad_memory)]
        first = [torch.empty_like(memory[0]) for _ in range(2)]
        grad_gates = torch.empty_like(gates)
        wanted = (self.problem.norm, self.problem.norm, self.scale_i is not None, self.scale_f is not None)
        shares = [torch.empty_like(first[0]) if want else None for want in wanted]
        given = (self.recurrent, memory, grad_output, *last, *first, grad_gates)
        norm = (self.weights.norm_weight, self.weights.norm_bias, moments, *shares)
        self._launch("backward", gates, given, norm, workspace)
        return Gradients(grad_gates, first[0], first[1], *shares)

    def _launch(
        self, direction: str, gates: Tensor, given: tuple[Tensor | None, ...], norm: tuple[Tensor | None, ...],
        workspace: Tensor,
    ) -> None:  # fmt: skip
        """Run a kernel on each part of the batch."""
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
    """A compiled kernel, the threads of a block, and the 32-bit words of workspace of a launch."""
    plan = plan_for(problem)
    if plan is None:
        raise TypeError("a problem that was refused")
    launch = plan.forward if direction == "forward" else plan.backward
    macros = _macros(problem, plan, launch, mask, direction == "backward")
    kernel = nvrtc.compile_kernel(SOURCE, KERNELS[direction], macros, launch.shared, problem.device, launch.cluster)
    values = plan.slices * plan.units * (len(problem.cell.recurrent_gates) if direction == "backward" else 1)
    row = launch.cluster * -(-values // launch.cluster * problem.dtype.itemsize // 64) * 64
    published = 4 * plan.groups * plan.rows * row
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
        ("MAX_PASS_TILES", launch.pass_tiles),
        ("FOLD", int(launch.fold)),
    )
