"""The one place that decides how a recurrence is computed.

To plug in a kernel, write a file with a ``recurrence`` of the reference's signature and a function that says, in a
sentence, why it cannot take a given problem (None if it can), and add a row to :data:`BACKENDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import batched, native, persistent, reference, scan
from fairseq_rkm.ops.cells import Cell
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
        automatic: whether ``"auto"`` may pick it.
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
"""By name, the preferred first."""


def check_backend(name: str) -> None:
    """Raises RKMError for a name that is neither ``"auto"`` nor a backend's."""
    if name != "auto" and name not in BACKENDS:
        raise RKMError(f"unknown backend {name!r}; choose one of auto, {', '.join(BACKENDS)}")


def pick(name: str, cell: Cell, inputs: Tensor, weights: Weights) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that takes the problem.

    Raises:
        RKMError: an unknown name, or a backend asked for by name that cannot take the problem: it is never replaced by
            another.
    """
    check_backend(name)
    if name == "auto":
        candidates = (b for b in BACKENDS.values() if b.automatic and b.refuses(cell, inputs, weights) is None)
        return next(candidates)
    reason = BACKENDS[name].refuses(cell, inputs, weights)
    if reason is not None:
        raise RKMError(f"backend {name!r} cannot run this: {reason}")
    return BACKENDS[name]


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`fairseq_rkm.ops.reference.recurrence`, by the backend named; ``size``: d.

    An initial ``hidden`` or ``memory`` that is None is zero.

    Raises:
        RKMError: inputs, weights and state of different devices or dtypes, or a backend that refuses.
    """
    for what, tensor in (("the weights", weights.input), ("the hidden state", hidden), ("the memory", memory)):
        if tensor is not None and tensor.device != inputs.device:
            raise RKMError(f"the inputs are on {inputs.device} but {what} on {tensor.device}; move them to one device")
    matrices = ("weights", weights.input), ("recurrent weights", weights.recurrent), ("biases", weights.bias)
    for what, tensor in matrices:
        if tensor is not None and tensor.dtype != inputs.dtype:
            raise RKMError(
                f"the inputs are {inputs.dtype} but the {what} {tensor.dtype}; convert one, or use torch.autocast"
            )
    wide = memory_dtype(inputs.dtype)
    weights = weights.widen(wide)
    chosen = pick(backend, cell, inputs, weights)
    if not chosen.takes_none:
        zeros = inputs.new_zeros(inputs.size(1), size) if hidden is None or memory is None else None
        hidden, memory = zeros if hidden is None else hidden, zeros if memory is None else memory
    hidden = None if hidden is None else hidden.to(inputs.dtype)
    memory = None if memory is None else memory.to(wide)
    return chosen.run(cell, inputs.contiguous(), weights, hidden, memory, keep)
