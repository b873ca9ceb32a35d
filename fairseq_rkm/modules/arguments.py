"""Checks of the constructor's arguments. Its order is not ``nn.LSTM``'s: a value in another's place is refused."""

import math
from numbers import Integral, Real

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.dropout import check_probability
from fairseq_rkm.ops import CELLS
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.kernel_candidates import sees_hidden
from fairseq_rkm.ops.kernel_functions import Kernel


def check_cell(cell: object) -> None:
    """Raise RKMError for a cell that is no name, as where ``nn.LSTM``'s bias was meant."""
    if not isinstance(cell, str):
        raise RKMError(
            f"cell must be one of {', '.join(CELLS)}, not {cell!r}. It is the fourth argument, where nn.LSTM has bias: "
            "from there on write nn.LSTM's arguments by name (bias=..., batch_first=..., dropout=..., "
            "bidirectional=..., proj_size=...)"
        )


def check_sizes(**sizes: object) -> None:
    """Raise RKMError for a size that is no whole number above 0."""
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise RKMError(f"{what} must be a whole number, not {size!r}")
        if int(size) < 1:
            raise RKMError(f"{what} must be at least 1, not {size}")


def check_switches(**switches: object) -> None:
    """Raise RKMError for a switch that is neither True nor False."""
    for what, switch in switches.items():
        if not isinstance(switch, bool):
            raise RKMError(f"{what} must be True or False, not {switch!r}")


def check_numbers(**numbers: object) -> None:
    """Raise RKMError for what is no number."""
    for what, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real):
            raise RKMError(f"{what} must be a number, not {number!r}")


def check_projection(proj_size: object, hidden_size: int) -> None:
    """Raise RKMError for a size of projections that is no whole number, or does not make ``h_t`` smaller."""
    if isinstance(proj_size, bool) or not isinstance(proj_size, Integral) or not 0 <= int(proj_size) < hidden_size:
        wanted = "a whole number from 0, for no projections, to below hidden_size"
        raise RKMError(f"proj_size must be {wanted} ({hidden_size}), not {proj_size!r}")


def check_scales(**scales: float) -> None:
    """Raise RKMError for a scale outside (0, 1)."""
    for what, scale in scales.items():
        if not 0 < scale < 1:
            raise RKMError(f"{what} must lie within (0, 1), not be {scale}")


def check_state_dropout(what: str, p: float, cell: Cell) -> None:
    """Raise RKMError for a probability outside [0, 1), or for one of a state that is not read, or not by products."""
    check_probability(what, p)
    if p and not cell.has_feedback:
        raise RKMError(f"{what} drops units of h_{{t-1}}, and without feedback nothing reads it: leave it out")
    if p and not cell.kernel.is_linear and sees_hidden(cell):
        raise RKMError(
            f"{what} drops columns of the weights that multiply h_{{t-1}}, and the {cell.kernel.name} kernel does more "
            "than multiply: leave it out"
        )


def check_kernel(kernel: Kernel, scale: object, offset: object, learn: bool) -> None:
    """Raise RKMError for a kernel's scale that is not above 0, its offset below 0, or one that the kernel lacks."""
    for what, value, below, wanted in (
        ("scale", scale, 0, "above 0"),
        ("offset", offset, -math.ulp(0.0), "at least 0"),
    ):
        if value is None:
            continue
        if what not in kernel.parameters:
            raise RKMError(f"the kernel {kernel.name!r} has no {what}: leave kernel_{what} out")
        check_numbers(**{f"kernel_{what}": value})
        if not below < float(value) < math.inf:  # type: ignore[arg-type]
            raise RKMError(f"kernel_{what} must be {wanted} and finite, not {value}")
    if learn and offset == 0 and offset is not None:
        raise RKMError("a kernel's offset that is learned starts above 0; learn_kernel=False fixes it at 0")
