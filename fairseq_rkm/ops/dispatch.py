"""The one place that picks a backend for a recurrence, and the way to it.

A new backend is a file with :class:`fairseq_rkm.ops.passes.Passes`, a function ``refuses`` and a row of
:data:`BACKENDS`. ``refuses`` says in a sentence why the backend cannot take a given problem, or returns None.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import eager, exported_loop, operators
from fairseq_rkm.ops.backends import batched, blockwise, native, persistent, scan, stepwise
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.higher_derivatives import REFERENCE, recurrence_by_reference
from fairseq_rkm.ops.operators import Operator
from fairseq_rkm.ops.passes import Directions
from fairseq_rkm.ops.plain_tensors import are_plain, is_followed, is_ready, obstacle
from fairseq_rkm.ops.problem_checks import check, check_inputs, laid_out
from fairseq_rkm.ops.weights import Weights

Refusal = Callable[[Cell, Tensor, Weights], str | None]
Estimate = Callable[[Cell, Tensor, Weights], float]


def _takes_all(*_problem: object) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute a recurrence.

    Attributes:
        operator: its passes, and the operator that is made of them.
        refuses: why a problem is beyond it, or None.
        automatic: whether ``"auto"`` may pick it. Where only PyTorch's own operators work, ``"auto"`` takes the
            reference.
        step_time: the estimated microseconds of a step of a problem that it takes; None for a backend that is
            preferred to all behind it, whatever the problem.
        host_time: the microseconds that a call, forward and backward, takes the host at least. Few steps take the GPU
            less.
        directions: its passes for both directions of a layer at once; None if it has none.
    """

    operator: Operator
    refuses: Refusal = _takes_all
    automatic: bool = True
    step_time: Estimate | None = None
    directions: Directions | None = None
    host_time: float = 0.0


def _linear_alone(refuses: Refusal) -> Refusal:
    """The refusal of a backend whose candidates are linear."""

    def refuses_kernels(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
        if not cell.kernel.is_linear:
            return f"it has the linear kernel alone, not {cell.kernel.name!r}; batched has all, and on GPUs stepwise"
        return refuses(cell, inputs, weights)

    return refuses_kernels


def _backend(
    name: str, passes: Any, refuses: Refusal = _takes_all, automatic: bool = True, step_time: Estimate | None = None,
    kernels: bool = False, directions: Directions | None = None, host_time: float = 0.0,
) -> tuple[str, Backend]:  # fmt: skip
    """``kernels``: whether it takes candidates through any kernel; otherwise it refuses all but the linear one."""
    refuses = refuses if kernels else _linear_alone(refuses)
    return name, Backend(Operator(name, passes, refuses), refuses, automatic, step_time, directions, host_time)


MOST_HOST_BOUND = 16
"""Up to so many steps the host takes longer than the GPU, or little less."""
FEW_LAUNCHES, MANY_LAUNCHES = 400.0, 800.0
"""Host times. On an H200's host, shared with other work, 16 steps of d = 1150 forward took 226 us with ``persistent``
(B = 16) and 502 with ``stepwise`` (B = 64)."""
BACKENDS: dict[str, Backend] = dict(
    (
        _backend(
            "blockwise", blockwise.PASSES, blockwise.refuses, step_time=blockwise.step_time,
            directions=blockwise.DIRECTIONS, host_time=FEW_LAUNCHES,
        ),
        _backend(
            "persistent", persistent.PASSES, persistent.refuses, step_time=persistent.step_time, host_time=FEW_LAUNCHES
        ),
        _backend(
            "stepwise", stepwise.PASSES, stepwise.refuses, step_time=stepwise.step_time, kernels=True,
            host_time=MANY_LAUNCHES,
        ),
        _backend("scan", scan.PASSES, scan.refuses, kernels=True),
        _backend("native", native.PASSES, native.refuses),
        _backend("batched", batched.PASSES, kernels=True),
        _backend("reference", REFERENCE, automatic=False, kernels=True),
    )
)  # fmt: skip
"""The backends by name, the preferred first."""


def check_backend(name: str) -> None:
    """Raise RKMError for a name that is neither ``"auto"`` nor a backend's."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise RKMError(f"unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")


def pick(
    name: str, cell: Cell, inputs: Tensor, weights: Weights, obstacle: str | None = None, few: bool = False
) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that takes the problem, or the fastest by its estimate.

    Args:
        name: ``"auto"`` or a backend's.
        cell: the cell.
        inputs: extended inputs.
        weights: the weights.
        obstacle: the reason why only PyTorch's own operators work, and with them only the reference; None if all do.
        few: whether there are at most :data:`MOST_HOST_BOUND`, so that the host's time counts, too.

    Raises:
        RKMError: the name is unknown, or the named backend cannot take the problem. No other takes its place.
    """
    check_backend(name)
    if name == "auto":
        if obstacle is not None:
            return BACKENDS["reference"]
        return _fastest(cell, inputs, weights, few)
    reason = obstacle if name != "reference" else None
    reason = reason or BACKENDS[name].refuses(cell, inputs, weights)
    if reason is not None:
        raise RKMError(f"backend {name!r} cannot run this: {reason}")
    return BACKENDS[name]


def _fastest(cell: Cell, inputs: Tensor, weights: Weights, few: bool) -> Backend:
    """The first automatic backend that takes a problem; of neighbours with estimates, the one with the lowest."""
    best, lowest = None, math.inf
    for backend in BACKENDS.values():
        if best is not None and backend.step_time is None:
            break
        if not backend.automatic or backend.refuses(cell, inputs, weights) is not None:
            continue
        if backend.step_time is None:
            return backend
        time = backend.step_time(cell, inputs, weights)
        time = max(time, backend.host_time / MOST_HOST_BOUND) if few else time
        if time < lowest:
            best, lowest = backend, time
    return BACKENDS["reference"] if best is None else best


def picked(name: str, cell: Cell, inputs: Tensor, weights: Weights) -> Backend:
    """As :func:`pick`, looked up where a problem of this kind was met before.

    All tensors are plain and known to fit together, and n is 1.
    """
    steps, batch, features = inputs.shape
    of_weights = weights.input.size(0), weights.norm_weight is None, weights.recurrent is None
    length = _length(steps)
    kind = str(name), cell.key, length, batch, features, inputs.dtype, inputs.device, tf32(inputs), *of_weights
    chosen = _PROVEN.get(kind)
    if chosen is None:
        chosen = pick(name, cell, inputs, weights, None, steps <= MOST_HOST_BOUND)
        _remember(kind, chosen)
    return chosen


def _length(steps: int) -> int:
    """The part of a number of steps that checks and choice depend on: none, one, few, more."""
    return min(steps, 2) if steps <= MOST_HOST_BOUND else 3


def _remember(kind: tuple[Any, ...], chosen: Backend) -> None:
    if len(_PROVEN) >= MOST_PROVEN:
        _PROVEN.clear()
    _PROVEN[kind] = chosen


def leaves_room(name: str, cell: Cell, size: int, dtype: torch.dtype, norm: bool) -> bool:
    """Whether a backend leaves most of a GPU idle, so that another recurrence may run beside this one.

    Args:
        name: ``"auto"`` or a backend's.
        cell: the cell.
        size: d.
        dtype: of the inputs.
        norm: whether the memory is normalised.
    """
    alone = size <= blockwise.MOST_UNITS and cell.has_feedback and not norm and dtype != torch.float64
    alone = alone and cell.kernel.is_linear
    return alone and name in ("auto", "blockwise")


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.reference.recurrence`, by the backend named; ``size``: d.

    None for ``hidden`` or ``memory`` stands for zeros; others are converted to the dtypes of the computation. All
    tensors for a backend are checked here and made contiguous.

    Raises:
        RKMError: inputs, weights, state and mask differ in device or dtype; a shape does not fit; numbers are not
            floating-point ones; or the backend refuses.
    """
    if not torch.compiler.is_compiling():
        if keep is None and not is_followed() and _are_ready(cell, inputs, weights, size, hidden, memory):
            return _run(picked(backend, cell, inputs, weights), cell, inputs, weights, hidden, memory, keep)
        if are_plain(inputs, hidden, memory, keep, *weights.tensors()):
            return _run_plain(backend, cell, inputs, weights, size, hidden, memory, keep)
    if backend == "auto" and exported_loop.is_recording():
        return exported_loop.recurrence(cell, inputs, weights, size, hidden, memory, keep)
    if not torch.jit.is_tracing():  # tracing warns of each comparison
        check(cell, inputs, weights, size, hidden, memory, keep)
    if torch.compiler.is_dynamo_compiling() and not (backend == "reference" and exported_loop.is_exporting()):
        # The compiler reads Python; the choice of a backend is not its business. It calls the operator with fake
        # tensors, and finds the chosen backend's operator.
        return _COMPILED(backend, *operators.arguments(cell, inputs, weights, hidden, memory, keep))
    return _choose_and_run(backend, cell, inputs, weights, hidden, memory, keep)


_PROVEN: dict[tuple[Any, ...], Backend] = {}
"""The backends of problems that passed all checks, by all that checks and choice depend on.

Checks, and the question to all backends, take a tenth of a small layer's host time.
"""
MOST_PROVEN = 4096


def _run_plain(
    backend: str, cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None,
    memory: Tensor | None, keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`recurrence`, for plain tensors that nothing follows."""
    chosen = proven(backend, cell, inputs, weights, size, hidden, memory, keep)
    if not is_laid_out(inputs, weights, hidden, memory):
        inputs, weights, hidden, memory = laid_out(inputs, weights, hidden, memory)
    return _run(chosen, cell, inputs, weights, hidden, memory, keep)


def _run(
    chosen: Backend, cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a backend on plain tensors, laid out as all backends read them."""
    if chosen is BACKENDS["reference"]:
        return recurrence_by_reference(cell, inputs, weights, hidden, memory, keep)
    return eager.run(chosen.operator, cell, inputs, weights, hidden, memory, keep)


def proven(
    backend: str, cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None,
    memory: Tensor | None, keep: Tensor | None,
) -> Backend:  # fmt: skip
    """The backend for plain tensors, after all checks; they are made once for each kind of problem.

    Raises:
        RKMError: as :func:`recurrence`.
    """
    check_inputs(inputs)
    kind = _kind(backend, cell, inputs, weights, size, hidden, memory, keep)
    chosen = _PROVEN.get(kind)
    if chosen is None:
        check(cell, inputs, weights, size, hidden, memory, keep)
        steps = inputs.shape[0] - weights.input.size(-1) // inputs.shape[2] + 1
        chosen = pick(backend, cell, inputs, weights, None, steps <= MOST_HOST_BOUND)
        _remember(kind, chosen)
    return chosen


def _are_ready(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None
) -> bool:
    """Whether it is seen at once that tensors are plain, fit together, and are laid out as all backends read them.

    Most problems are so: n = 1, without layer norm, with numbers for scales. For others the answer is no.
    """
    matrix, recurrent, bias, gain, shift, scale_i, scale_f, *of_kernel = weights
    if type(scale_i) is not float or type(scale_f) is not float or inputs.dim() != 3:
        return False
    if gain is not None or shift is not None or of_kernel != [None, None] or not inputs.is_floating_point():
        return False
    kind, place, shape = inputs.dtype, inputs.get_device(), inputs.shape
    wide = kind if kind.itemsize >= torch.float32.itemsize else torch.float32
    width, row = len(cell.gates) * size, (shape[1], size)
    given: tuple[tuple[Any, tuple[int, ...], torch.dtype], ...] = (
        (inputs, shape, kind), (matrix, (width, shape[2]), kind), (bias, (width,), kind), (hidden, row, kind),
        (memory, row, wide), (recurrent, (len(cell.recurrent_gates) * size, size), kind),
    )  # fmt: skip
    try:
        for tensor, wanted, dtype in given:
            if tensor is not None and not is_ready(tensor, wanted, dtype, place):
                return False
    except RuntimeError:  # one has no storage
        return False
    return True


def _kind(
    backend: str, cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None,
    memory: Tensor | None, keep: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """All that :func:`check` and :func:`pick` look at."""
    length, batch, features = inputs.shape
    steps = length - weights.input.size(-1) // features + 1
    return (
        str(backend), cell.key, size, _length(steps), batch, features, inputs.dtype, inputs.device,
        tf32(inputs),
        keep is None or (keep.shape == (steps, batch), keep.dtype, keep.device),
        *[
            tensor if tensor is None or isinstance(tensor, float) else (tensor.shape, tensor.dtype, tensor.device)
            for tensor in (hidden, memory, *weights)
        ],
    )  # fmt: skip


def tf32(inputs: Tensor) -> bool | None:
    """Whether products may be TF32; None where no backend asks, and where PyTorch has several answers."""
    if not inputs.is_cuda or inputs.dtype is not torch.float32:
        return None
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # convolutions and recurrent layers differ; a backend that asks says so
        return None


def is_laid_out(inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None) -> bool:
    """Whether it is seen at once that :func:`laid_out` would change nothing."""
    dtype = inputs.dtype
    if hidden is not None and not (hidden.dtype is dtype and hidden.is_contiguous()):
        return False
    wide = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
    if memory is not None and not (memory.dtype is wide and memory.is_contiguous()):
        return False
    for matrix in (inputs, *weights[:3]):
        if matrix is not None and not matrix.is_contiguous():
            return False
    for field in weights[3:]:
        if isinstance(field, Tensor) and not (field.dtype is wide and field.is_contiguous()):
            return False
    return True


def _choose_and_run(
    backend: str, cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None, unroll: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``unroll``: whether the reference is run step by step, and not as an operator."""
    tensors = inputs, hidden, memory, keep, *weights.tensors()
    plain = are_plain(*tensors)
    reason = None if plain else obstacle(*tensors)
    chosen = pick(backend, cell, inputs, weights, reason)
    inputs, weights, hidden, memory = laid_out(inputs, weights, hidden, memory)
    if chosen is BACKENDS["reference"] and (unroll or reason is not None):
        return recurrence_by_reference(cell, inputs, weights, hidden, memory, keep)
    run = eager.run if plain else Operator.forward
    return run(chosen.operator, cell, inputs, weights, hidden, memory, keep)


def _run_compiled(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    cell, keep, inputs, hidden, memory, weights, _ = operators.read(*arguments)
    return _choose_and_run(backend, cell, inputs, weights, hidden, memory, keep, unroll=False)


_COMPILED = operators.define(
    "recurrence", f"(str backend, {operators.ARGUMENTS}) -> (Tensor, Tensor, Tensor)", "CompositeImplicitAutograd",
    _run_compiled,
)  # fmt: skip
