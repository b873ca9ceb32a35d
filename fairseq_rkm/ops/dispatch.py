"""The one place that picks a backend for a recurrence.

A new backend is a file with two functions and a row of :data:`BACKENDS`. ``recurrence`` has the reference's signature.
``refuses`` says in a sentence why the backend cannot take a given problem, or returns None.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import reference
from fairseq_rkm.ops.backends import batched, native, persistent, scan
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.plain_tensors import obstacle
from fairseq_rkm.ops.weights import Weights, memory_dtype

Run = Callable[..., tuple[Tensor, Tensor, Tensor]]
Refusal = Callable[[Cell, Tensor, Weights], str | None]


def _takes_all(*_problem: object) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """A way to compute a recurrence.

    Attributes:
        run: as :func:`fairseq_rkm.ops.reference.recurrence`.
        refuses: why a problem is beyond it, or None.
        automatic: whether ``"auto"`` may pick it. Where only PyTorch's own operators work, ``"auto"`` takes the
            reference.
        takes_none: whether it takes None for an initial state of zeros.
    """

    run: Run
    refuses: Refusal = _takes_all
    automatic: bool = True
    takes_none: bool = False


BACKENDS: dict[str, Backend] = {
    "persistent": Backend(persistent.recurrence, persistent.refuses, takes_none=True),
    "scan": Backend(scan.recurrence, scan.refuses, takes_none=True),
    "native": Backend(native.recurrence, native.refuses),
    "batched": Backend(batched.recurrence),
    "reference": Backend(reference.recurrence, automatic=False),
}
"""The backends by name, the preferred first."""


def check_backend(name: str) -> None:
    """Raise RKMError for a name that is neither ``"auto"`` nor a backend's."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise RKMError(f"unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")


def pick(name: str, cell: Cell, inputs: Tensor, weights: Weights, obstacle: str | None = None) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that takes the problem.

    Args:
        name: ``"auto"`` or a backend's.
        cell: the cell.
        inputs: extended inputs.
        weights: the weights.
        obstacle: the reason why only PyTorch's own operators work, and with them only the reference; None if all do.

    Raises:
        RKMError: the name is unknown, or the named backend cannot take the problem. No other takes its place.
    """
    check_backend(name)
    if name == "auto":
        if obstacle is not None:
            return BACKENDS["reference"]
        candidates = (b for b in BACKENDS.values() if b.automatic and b.refuses(cell, inputs, weights) is None)
        return next(candidates)
    reason = obstacle if name != "reference" else None
    reason = reason or BACKENDS[name].refuses(cell, inputs, weights)
    if reason is not None:
        raise RKMError(f"backend {name!r} cannot run this: {reason}")
    return BACKENDS[name]


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
    if not torch.jit.is_tracing():  # tracing warns of each comparison
        _check(cell, inputs, weights, size, hidden, memory, keep)
    reason = obstacle(inputs, hidden, memory, keep, *weights.tensors())
    chosen = pick(backend, cell, inputs, weights, reason)
    if not chosen.takes_none:
        zeros = inputs.new_zeros(inputs.size(1), size) if hidden is None or memory is None else None
        hidden, memory = zeros if hidden is None else hidden, zeros if memory is None else memory
    wide = memory_dtype(inputs.dtype)
    hidden = None if hidden is None else hidden.to(inputs.dtype).contiguous()
    memory = None if memory is None else memory.to(wide).contiguous()
    return chosen.run(cell, inputs.contiguous(), weights.laid_out(wide), hidden, memory, keep)


def _check(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None,
) -> None:  # fmt: skip
    """Check shapes, dtypes and devices; a wrong shape might be broadcast, or read beyond its end."""
    device, dtype, (length, batch, features) = inputs.device, inputs.dtype, inputs.shape
    gates, ngram = len(cell.gates) * size, max(1, weights.input.size(-1) // features)
    for what, tensor, shape, wanted in (
        ("weights", weights.input, (gates, ngram * features), dtype),
        ("recurrent weights", weights.recurrent, (len(cell.recurrent_gates) * size, size), dtype),
        ("biases", weights.bias, (gates,), dtype),
        ("layer norm's gain", weights.norm_weight, (size,), None),
        ("layer norm's bias", weights.norm_bias, (size,), None),
        ("hidden state", hidden, (batch, size), None),
        ("memory", memory, (batch, size), None),
        ("mask", keep, (length - ngram + 1, batch), torch.bool),
    ):
        if tensor is None:
            continue
        if tensor.device != device:
            raise RKMError(f"the inputs are on {device} but the {what} on {tensor.device}; move them to one device")
        if wanted is not None and tensor.dtype != wanted:
            raise RKMError(f"the inputs are {dtype} but the {what} {tensor.dtype}; convert one, or use torch.autocast")
        if wanted is None and not tensor.is_floating_point():
            raise RKMError(f"the {what} must be floating-point numbers, not {tensor.dtype}")
        if tensor.shape != shape:
            raise RKMError(f"the {what} must be of shape {shape} here, not {tuple(tensor.shape)}")
    if not inputs.is_floating_point():
        raise RKMError(f"the inputs must be floating-point numbers, not {dtype}")
