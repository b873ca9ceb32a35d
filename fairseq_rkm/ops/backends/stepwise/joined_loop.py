"""The loop over the steps of one pass with one kernel a step, ``joined_kernels.py``, for a few rows.

A product with few rows waits for the weights. The rest of a step is then worth no launch of its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.backends.stepwise.step_loop import Kind, StepLoop, equation_options, multiply, precision_of
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.triton_presence import is_triton_before

MOST_ROWS = {"float32": 8, "tf32": 1, "float16": 1, "bfloat16": 1}
"""The largest batch with one kernel a step, by precision.

On an H200 a layer takes 0.35 to 0.93 of the time of two launches a step (20 layers of 256 to 2048 units). With eight
rows in TF32 and 16 bits it takes 1.0 to 1.5 times as long: the tensor cores multiply these.
"""
LARGEST_BATCH = 8
"""A thread sums for all rows of the batch: more do not fit into its registers."""
LEAST_UNITS, MOST_UNITS_OF_ROWS = 129, 2048
"""Smaller layers are for other backends. Of larger ones with several rows, two launches take 9% less (3072 units)."""
MOST_EARLY_UNITS = 1024
"""A step's kernel of one row and so many units begins before the one before has ended, on GPUs that can (Hopper and
later). On an H200 this saves 6 to 26% up to 1024 units, and costs up to 31% from 1150 on and of more rows."""
OLDEST_TRITON = 3, 5
"""The first Triton whose order of threads is known, for one kernel a step; the kernels of 3.3 cannot begin early."""
WARP, LOAD, SIDE = 32, 16, 64
"""The threads of a warp, the bytes that each fetches at once, and the side of a transposed tile."""


class Plan(NamedTuple):
    """How a program divides its work.

    Attributes:
        deep: the rows of weights of a thread: the recurrent gates forward, of as many units backward.
        units: the units that a warp has side by side; ``deep`` times as many for a program backward.
        split: the warps. They share the sums.
    """

    deep: int
    units: int
    split: int


PLANS: dict[tuple[bool, int, int], Plan] = {}
"""Plans for a pass, rows and a size in place of :func:`plan_for`'s: for measurements."""


def is_joined(cell: Cell, batch: int, size: int, dtype: torch.dtype, norm: bool, tf32: bool) -> bool:
    """Whether a step is one kernel: for the linear one without layer normalisation, and small batches."""
    if norm or not cell.kernel.is_linear or size < LEAST_UNITS or (batch > 1 and size > MOST_UNITS_OF_ROWS):
        return False
    if is_triton_before(*OLDEST_TRITON):
        return False
    return batch <= min(MOST_ROWS[precision_of(dtype, tf32)], LARGEST_BATCH)


def plan_for(kind: Kind) -> Plan:
    """At least 128 programs, no more than an H200 holds at once, and then as few sums across threads as that allows.

    Of several plans for a size, one with the least padding.
    """
    planned = PLANS.get((kind.backward, kind.rows, kind.size))
    if planned is not None:
        return planned
    plans = next(plans for most, plans in _PLANS[kind.backward, kind.rows > 1] if kind.size <= most)
    plan = min(plans, key=lambda plan: padded_length(kind, plan))
    if kind.backward:
        return plan
    return plan._replace(deep=1 << (len(kind.cell.recurrent_gates) - 1).bit_length())


def padded_length(kind: Kind, plan: Plan) -> int:
    """The numbers in a row of weights, padded to whole rounds: in each a thread fetches once."""
    a_round = plan.split * WARP // plan.units * LOAD // kind.dtype.itemsize
    return -(-(kind.recurrent if kind.backward else kind.size) // a_round) * a_round


_ANY = 1 << 30
_PLANS = {
    (False, False): [(1536, [Plan(4, 2, 4), Plan(4, 4, 4)]), (_ANY, [Plan(4, 4, 4)])],
    (False, True): [
        (512, [Plan(4, 2, 4), Plan(4, 4, 4)]), (1536, [Plan(4, 4, 4), Plan(4, 8, 4)]), (_ANY, [Plan(4, 8, 4)]),
    ],
    (True, False): [
        (1024, [Plan(2, 1, 8), Plan(2, 2, 8), Plan(2, 2, 4)]), (1536, [Plan(4, 1, 8), Plan(4, 2, 8)]),
        (_ANY, [Plan(4, 2, 8)]),
    ],
    (True, True): [
        (256, [Plan(1, 2, 8), Plan(1, 2, 4)]), (512, [Plan(2, 2, 8), Plan(2, 2, 4)]),
        (1056, [Plan(2, 4, 16), Plan(2, 4, 8)]), (_ANY, [Plan(2, 4, 8)]),
    ],
}  # fmt: skip
"""For a pass and more than one row: plans up to a size."""


class JoinedLoop(StepLoop):
    """A loop of one kernel a step.

    Attributes:
        weights: U, ``(R * d, d)``, and for the backward pass transposed; rows padded with zeros.
        fed: of two steps in turn, ``(2, rows, ...)``: h forward, the recurrent gates' gradients backward.
        sums: the gradient of the last h from outside, ``(1, rows, d)``.
        carry, held: as a :class:`StepLoop` has them.
    """

    def _make_buffers(self, weights: Tensor | None) -> None:
        kind = self.kind
        read = kind.recurrent if kind.backward else kind.size
        self._options = _options(kind, self.device)
        self._length = padded_length(kind, plan_for(kind))
        made = kind.size if kind.backward else kind.recurrent
        as_they_are = not kind.backward and weights is not None and self._length == read and _lie_well(weights)
        self.weights = (
            weights if as_they_are and weights is not None else self._zeros(made, self._length, dtype=kind.dtype)
        )
        self.fed = self._zeros(2, kind.rows, self._length, dtype=kind.dtype)
        own = (kind.rows, kind.size) if kind.backward else (0, 0)
        self.sums, self.carry, self.held = self._zeros(1, *own), self._zeros(*own), self._zeros(*own)

    def take_weights(self, recurrent: Tensor) -> None:
        """Copy them, padded or transposed."""
        if self.weights is recurrent:
            return
        if not self.kind.backward:
            self.weights[:, : self.kind.size] = recurrent
            return
        rows, columns = recurrent.shape
        grid = -(-rows // SIDE), -(-columns // SIDE)
        _kernels().transpose[grid](recurrent.contiguous(), self.weights, rows, columns, self._length, BLOCK=SIDE)

    def begin_forward(self, hidden: Tensor) -> None:
        """Begin with the first h, ``(B, d)``."""
        self.fed[0, : hidden.size(0), : self.kind.size] = hidden

    def first_hidden_gradient(self, batch: int, steps: int) -> Tensor:
        """The gradient of the first h, ``(B, d)``: a product that no step has taken."""
        sums = torch.empty_like(self.sums[0])
        multiply(self.fed[steps % 2], self.weights.t(), sums, self.kind.tf32)
        return sums[:batch] + self.held[:batch]

    def step(self, ahead: int) -> None:
        """Launch the step after ``ahead`` further ones."""
        kind, kernels = self.kind, _kernels()
        units = self._options["UNITS"] * (self._options["DEEP"] if kind.backward else 1)
        grid = (-(-kind.size // units),)
        if kind.backward:
            tensors = self.weights, self.sums, self.fed, self.carry, self.held
            kernels.backward[grid](self.table, *tensors, ahead, kind.size, self._length, **self._options)
        else:
            kernels.forward[grid](
                self.table, self.weights, self.fed, ahead, kind.size, self._length, **self._options
            )  # fmt: skip


def new_loop(kind: Kind, device: torch.device, weights: Tensor | None = None) -> StepLoop:
    """A loop of a kind, with buffers and without graphs."""
    return (JoinedLoop if kind.joined else StepLoop)(kind, device, weights)


def _kernels() -> Any:
    """The kernels; importing them takes Triton."""
    from fairseq_rkm.ops.backends.stepwise import joined_kernels

    return joined_kernels


def _lie_well(weights: Tensor) -> bool:
    return weights.is_contiguous() and weights.data_ptr() % LOAD == 0


def _options(kind: Kind, device: torch.device) -> dict[str, Any]:
    """The compile-time arguments of a kind's kernel."""
    plan = plan_for(kind)
    early = kind.rows == 1 and kind.size <= MOST_EARLY_UNITS
    early = early and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {
        **equation_options(kind), "ROWS": kind.rows, "DEEP": plan.deep, "SPLIT": plan.split, "UNITS": plan.units,
        "LANES": WARP // plan.units, "WIDE": LOAD // kind.dtype.itemsize, "EARLY": early, "num_warps": plan.split,
        **({"launch_pdl": True} if early else {}),
    }  # fmt: skip
