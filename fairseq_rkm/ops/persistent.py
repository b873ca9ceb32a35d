"""On GPUs, with feedback: one launch for a whole sequence, the recurrent weights in shared memory (``persistent.cu``).

What does not depend on ``h_{t-1}`` (projections of the inputs, gradients of the weights) is one matrix product over all
steps, as in :mod:`fairseq_rkm.ops.batched`. Here stand the plan, that is how a layer is spread over the
multiprocessors, and the two launches.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_rkm.ops import nvrtc
from fairseq_rkm.ops.batched import gate_slices, recurrent_slice, sigma_gradients
from fairseq_rkm.ops.cells import CANDIDATE, FORGET, INPUT, OUTPUT, Cell
from fairseq_rkm.ops.ngram import project, project_backward
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights

SOURCE = Path(__file__).with_suffix(".cu")
WARPS = 8
MAX_ITEMS = 8
"""(unit, row) pairs that a thread may own before their values no longer fit its registers."""
MAX_SUMS = 112
"""Registers of a thread that may hold sums of products."""


@dataclass(frozen=True)
class Plan:
    """How a layer is spread over a GPU: ``groups`` times ``slices`` blocks, one a multiprocessor.

    Attributes:
        units: a block's units.
        slices: blocks that share a layer's units.
        groups: independent parts of the batch in a launch.
        rows: of the batch in a group.
        pass_tiles: tiles of 8 rows whose sums are exchanged between warps at a time, forward and backward.
        shared: bytes of shared memory, forward and backward.
    """

    units: int
    slices: int
    groups: int
    rows: int
    pass_tiles: tuple[int, int]
    shared: tuple[int, int]

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // 8) * 8

    def launches(self, batch: int) -> int:
        """The number of launches that a batch takes."""
        return -(-batch // (self.groups * self.rows))


@functools.cache
def make_plan(
    recurrent: int, size: int, batch: int, element: int, norm: bool, multiprocessors: int, shared: int
) -> Plan | None:
    """The plan with the lowest estimated time, or None if a layer's weights do not fit on the chip.

    Args:
        recurrent: the number of recurrent gates.
        size: d.
        batch: B.
        element: bytes of an element.
        norm: whether the memory is normalised.
        multiprocessors: of the GPU.
        shared: bytes of shared memory that a block can have.
    """
    best, best_cost = None, float("inf")
    for units in range(1, size + 1):
        slices = -(-size // units)
        for groups in range(1, min(multiprocessors // slices, -(-batch // 8)) + 1):
            for rows in _row_choices(batch, groups):
                plan, cost = _estimate(recurrent, units, slices, groups, rows, element, norm, shared)
                if plan is not None and cost * plan.launches(batch) < best_cost:
                    best, best_cost = plan, cost * plan.launches(batch)
        if 2 * units * size * element > shared:
            break
    return best


def _row_choices(batch: int, groups: int) -> list[int]:
    """Rows of a group: all of the batch in one launch, or what several launches of full tiles take."""
    whole = -(-batch // groups)
    return [whole, *(rows for rows in (64, 48, 40, 32, 24, 16, 8) if rows < whole)]


def _estimate(
    recurrent: int, units: int, slices: int, groups: int, rows: int, element: int, norm: bool, shared: int
) -> tuple[Plan | None, float]:
    """A plan and the clock cycles of a step forward and one backward, in rough terms that rank plans."""
    tiles = -(-rows // 8)
    passes, sizes, cycles = [], [], 0.0
    for m, k in ((recurrent * units, slices * units), (units, slices * recurrent * units)):
        chunks, m_tiles = -(-k * element // 64), -(-m // 16)
        staged = m * (chunks | 1) * 64
        extra = (rows * units + rows) * 8 if norm else 0
        room = shared - staged - extra
        fitting = [p for p in range(tiles, 0, -1) if WARPS * m_tiles * 16 * (p * 8 + 1) * 4 <= room]
        if not fitting or m_tiles * tiles * 4 > MAX_SUMS:
            return None, 0.0
        pass_tiles = fitting[0]
        per_pass = -(-units * pass_tiles * 8 // (WARPS * 32))
        if -(-tiles // pass_tiles) * per_pass > MAX_ITEMS:
            return None, 0.0
        passes.append(pass_tiles)
        sizes.append(staged + WARPS * m_tiles * 16 * (pass_tiles * 8 + 1) * 4 + extra)
        published = tiles * 8 * chunks * 64
        multiply = chunks * 2 * m_tiles * tiles * 2 + chunks * m_tiles * 1024 / 100
        fetch = max(published / 40, groups * slices * published / 2500)
        exchange = 2 * WARPS * m_tiles * 16 * tiles * 8 * 4 / 64
        cycles += 3000 + max(multiply, fetch) + exchange + (3000 if norm else 0)
    return Plan(units, slices, groups, rows, (passes[0], passes[1]), (sizes[0], sizes[1])), cycles


def plan_for(cell: Cell, inputs: Tensor, size: int, norm: bool) -> Plan | None:
    """:func:`make_plan` for the device and shapes at hand."""
    properties = torch.cuda.get_device_properties(inputs.device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    recurrent = len(cell.recurrent_gates)
    return make_plan(
        recurrent, size, inputs.size(1), inputs.element_size(), norm, properties.multi_processor_count, shared
    )


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
    if torch.cuda.get_device_capability(inputs.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if not inputs.numel() or not inputs.size(1):
        return "it needs at least one step and one sequence"
    if plan_for(cell, inputs, weights.recurrent.size(1), weights.norm_weight is not None) is None:
        return f"the weights of {weights.recurrent.size(1)} units do not fit on this GPU's multiprocessors"
    return nvrtc.available()


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor, memory: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fairseq_rkm.ops.reference.recurrence`; differentiable once."""
    return _Persistent.apply(cell, keep, inputs, hidden, memory, *weights)


class _Persistent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: Cell, keep: Tensor | None, inputs: Tensor, hidden: Tensor, memory: Tensor, *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = Weights(*tensors)
        gates = project(inputs, weights.input, weights.bias)
        hiddens, memories, moments = _Launches(cell, inputs, weights, keep).forward(gates, hidden, memory)
        ctx.cell, ctx.numbers = cell, weights.numbers()
        ctx.save_for_backward(keep, inputs, gates, hiddens, memories, moments, *weights.tensors())
        output = hiddens[1:] if keep is None else hiddens[1:] * keep.unsqueeze(-1)
        return output, hiddens[-1].clone(), memories[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_hidden: Tensor, grad_memory: Tensor) -> tuple[Any, ...]:
        keep, inputs, gates, hidden, memory, moments, *tensors = ctx.saved_tensors
        cell, weights, size = ctx.cell, Weights(*tensors)._replace(**ctx.numbers), hidden.size(2)
        launches = _Launches(cell, inputs, weights, keep)
        grad = launches.backward(gates, memory, moments, grad_output, grad_hidden, grad_memory)
        needs = dict(zip(Weights._fields, ctx.needs_input_grad[5:], strict=True))
        grads: dict[str, Tensor | None] = dict.fromkeys(Weights._fields)
        grad_inputs, grads["input"] = project_backward(
            grad.gates, inputs, weights.input, ctx.needs_input_grad[2], needs["input"]
        )
        if needs["recurrent"]:
            fed_back = grad.gates.flatten(0, 1)[:, recurrent_slice(cell, size)]
            grads["recurrent"] = fed_back.t() @ hidden[:-1].flatten(0, 1)
        if needs["bias"]:
            grads["bias"] = grad.gates.sum((0, 1))
        if grad.gain is not None and grad.shift is not None:
            grads["norm_weight"], grads["norm_bias"] = grad.gain.sum(0), grad.shift.sum(0)
        if needs["sigma_i"] or needs["sigma_f"]:
            block = gate_slices(cell, size)[CANDIDATE]
            grads["sigma_i"], grads["sigma_f"] = sigma_gradients(
                grad.gates[..., block].float(), gates[..., block].float(), memory[:-1], weights.sigma_i
            )
        ordered = [grads[name] if needs[name] else None for name in Weights._fields]
        return None, None, grad_inputs, grad.hidden.to(hidden.dtype), grad.memory, *ordered


class _Gradients(NamedTuple):
    """What the backward launch leaves: of the gates, the initial state and, row by row, the layer norm's parameters."""

    gates: Tensor
    hidden: Tensor
    memory: Tensor
    gain: Tensor | None
    shift: Tensor | None


class _Launches:
    """The two kernels, set up for a problem."""

    def __init__(self, cell: Cell, inputs: Tensor, weights: Weights, keep: Tensor | None) -> None:
        if weights.recurrent is None:
            raise TypeError("a recurrence without feedback")
        self.cell, self.weights, self.recurrent = cell, weights, weights.recurrent.contiguous()
        self.keep = None if keep is None else keep.to(torch.uint8).contiguous()
        self.size, self.batch = weights.recurrent.size(1), inputs.size(1)
        self.dtype, self.device = inputs.dtype, inputs.device
        plan = plan_for(cell, inputs, self.size, weights.norm_weight is not None)
        if plan is None:
            raise TypeError("a recurrence that was refused")
        self.plan = plan
        ones = torch.ones(self.size, device=self.device)
        self.scale_f = (ones * weights.sigma_f).contiguous() if cell.forget_is_constant else None
        self.scale_i = (ones[:1] * weights.sigma_i).contiguous() if cell.input_is_constant else None

    def forward(self, gates: Tensor, hidden: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turn ``W X + b`` into activated gates, in place; return all h and c, initial ones first, and the moments.

        ``(T + 1, B, d)`` twice; the layer norm's mean and reciprocal deviation, ``(T, B, 2)``, or None without.
        """
        steps = gates.size(0)
        hiddens = hidden.new_empty(steps + 1, self.batch, self.size)
        memories = memory.new_empty(steps + 1, self.batch, self.size)
        hiddens[0], memories[0] = hidden, memory
        moments = memory.new_empty(steps, self.batch, 2) if self.weights.norm_weight is not None else None
        published = self._published(self.plan.slices * self.plan.units)
        self._publish(published, hidden)
        self._launch(
            "recurrence_forward", published, steps,
            lambda published, flags: (
                gates, self.recurrent, hiddens, memories, published, flags, self.keep, self.weights.norm_weight,
                self.weights.norm_bias, moments,
            ),
        )  # fmt: skip
        return hiddens, memories, moments

    def backward(
        self, gates: Tensor, memory: Tensor, moments: Tensor | None, grad_output: Tensor, grad_hidden: Tensor,
        grad_memory: Tensor,
    ) -> _Gradients:  # fmt: skip
        """The gradients of everything but weights and inputs."""
        grad_output = grad_output.contiguous()
        grad_hidden, grad_memory = grad_hidden.float().clone(), grad_memory.float().clone()
        grad_gates = torch.empty_like(gates)
        gain = shift = None
        if moments is not None:
            gain, shift = torch.empty_like(grad_memory), torch.empty_like(grad_memory)
        published = self._published(self.plan.slices * self.plan.units * len(self.cell.recurrent_gates))
        self._launch(
            "recurrence_backward", published, gates.size(0),
            lambda published, flags: (
                gates, self.recurrent, memory, grad_output, grad_hidden, grad_memory, grad_gates, published, flags,
                self.keep, self.weights.norm_weight, moments, gain, shift,
            ),
        )  # fmt: skip
        return _Gradients(grad_gates, grad_hidden, grad_memory, gain, shift)

    def _published(self, values: int) -> Tensor:
        """Zeros, ``(launches, 2, groups, padded rows, padded values)``."""
        chunk = 64 // self.dtype.itemsize
        plan = self.plan
        shape = (plan.launches(self.batch), 2, plan.groups, plan.padded_rows, -(-values // chunk) * chunk)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _publish(self, published: Tensor, hidden: Tensor) -> None:
        """Lay ``h_0`` out as the blocks do their ``h_t``."""
        plan, count = self.plan, published.size(0)
        padded = hidden.new_zeros(count * plan.groups * plan.rows, self.size)
        padded[: self.batch] = hidden
        published[:, 0, :, : plan.rows, : self.size] = padded.view(count, plan.groups, plan.rows, self.size)

    def _launch(
        self, name: str, published: Tensor, steps: int, arguments: Callable[[Tensor, Tensor], tuple[Any, ...]]
    ) -> None:
        plan, backward = self.plan, int(name.endswith("backward"))
        kernel = nvrtc.compile_kernel(
            SOURCE, name, self._macros(plan.pass_tiles[backward]), plan.shared[backward], self.device.index or 0
        )
        blocks = plan.groups * plan.slices
        flags = torch.zeros(published.size(0), 2 * blocks, dtype=torch.int32, device=self.device)
        parts = None
        if self.weights.norm_weight is not None:
            parts = torch.empty(2 * blocks * plan.rows, 2, device=self.device)
        with torch.cuda.device(self.device):
            for i in range(published.size(0)):
                first = i * plan.groups * plan.rows
                kernel.launch(
                    blocks, WARPS * 32, *arguments(published[i], flags[i]), parts, self.scale_f, self.scale_i, steps,
                    first, self.batch,
                )  # fmt: skip

    def _macros(self, pass_tiles: int) -> tuple[tuple[str, int | str], ...]:
        """The cell, the types and the plan, as ``persistent.cu`` reads them."""
        cell, plan = self.cell, self.plan
        place = {gate: cell.gates.index(gate) if gate in cell.gates else -1 for gate in (INPUT, FORGET, OUTPUT)}
        return (
            ("GATES", len(cell.gates)),
            ("RECURRENT", len(cell.recurrent_gates)),
            ("FIRST_RECURRENT", cell.gates.index(cell.recurrent_gates[0])),
            *((gate.upper(), index) for gate, index in place.items()),
            ("SQUASH_CANDIDATE", int(cell.squash_candidate)),
            ("SQUASH_OUTPUT", int(cell.squash_output)),
            ("NORM", int(self.weights.norm_weight is not None)),
            ("EPSILON", f"{LAYER_NORM_EPS}f"),
            ("MASK", int(self.keep is not None)),
            ("ELEMENT", self.dtype.itemsize),
            ("BF16", int(self.dtype == torch.bfloat16)),
            ("SIZE", self.size),
            ("UNITS", plan.units),
            ("SLICES", plan.slices),
            ("GROUPS", plan.groups),
            ("ROWS", plan.rows),
            ("WARPS", WARPS),
            ("MAX_PASS_TILES", pass_tiles),
        )
