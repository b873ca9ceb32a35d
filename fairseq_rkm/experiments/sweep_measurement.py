"""One field of a sweep: layers of one size, batch and precision, checked, then timed beside ``torch.nn.LSTM``."""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from subprocess import CalledProcessError
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.errors import first_line
from fairseq_rkm.experiments.flashrnn_layer import FlashRNNLayer
from fairseq_rkm.experiments.recurrence_benchmark import (
    CALLS,
    forward_backward,
    graphed,
    largest,
    largest_error,
    once,
    outcome,
    reference_of,
    summary,
    timed,
)
from fairseq_rkm.ops import BACKENDS, Weights, resolve_cell
from fairseq_rkm.ops.dispatch import pick

PRECISIONS = {
    "bfloat16": (torch.bfloat16, 5e-2),
    "tf32": (torch.float32, 2e-3),
    "float16": (torch.float16, 1e-2),
    "float32": (torch.float32, 5e-5),
}
"""The dtype of each precision, and the largest relative error allowed; float32's leaves no room for TF32."""
FLASHRNN = "flashrnn"
"""The backend's name that stands for the package FlashRNN."""
CHECKED_STEPS = 16
"""The steps on which results are checked, with the whole batch: a kernel's plan depends on it."""
OUT_OF_MEMORY, WRONG = "out of memory", "wrong"
"""The beginnings of two sentences about failures."""
FAILURES = (RuntimeError, ValueError, ImportError, OSError, CalledProcessError, RKMError)
"""Errors after which a sweep goes on, memory that runs out among them."""

Result = TypeVar("Result")


class Field(NamedTuple):
    """The sizes of inputs and layer, ``d -> d``, and a key of :data:`PRECISIONS`."""

    length: int
    size: int
    batch: int
    precision: str


@dataclass(frozen=True)
class Contender:
    """A layer to compare with ``nn.LSTM``.

    Attributes:
        cell: a cell's name.
        feedback: whether the layer feeds back.
        memory_clip: as RKM's.
        backend: as RKM's, or :data:`FLASHRNN`.
    """

    cell: str
    feedback: bool
    memory_clip: str | float
    backend: str


class GPUError(Exception):
    """The GPU takes no further work from this process."""


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 matrices in TF32 or in float32, PyTorch's and cuDNN's."""
    products, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, cudnn.allow_tf32
    products.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        products.allow_tf32, cudnn.allow_tf32 = before


def measure_field(field: Field, contenders: list[Contender], device: str, seconds: float) -> list[dict[str, Any]]:
    """Check and time a field's contenders; a row each.

    A row holds field and contender, and ``picked``, the backend that computes; ``error``, the largest relative one;
    ``eager`` and on a GPU ``graph``, median and quartiles of forward and backward in milliseconds, and ``eager_ratio``
    and ``graph_ratio``, the speed relative to ``nn.LSTM``; ``lstm``, its times in the same run; and where something
    failed, a sentence: ``failure`` or ``graph_failure``.

    Args:
        field: the sizes.
        contenders: what is compared.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: how long each measurement is repeated.

    Raises:
        GPUError: the GPU is in error; its ``args[0]`` holds the rows.
    """
    lstm: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{**field._asdict(), **asdict(contender), "lstm": lstm} for contender in contenders]
    try:
        with products_in(field.precision):
            _fill(rows, lstm, field, contenders, device, seconds)
        if device == "cuda":
            torch.cuda.synchronize()
    except FAILURES as error:
        for row in rows:
            row.setdefault("failure", _sentence(error))
        if device == "cuda" and _is_in_error():
            raise GPUError(rows) from error
    finally:
        if device == "cuda" and not _is_in_error():
            gc.collect()
            torch.cuda.empty_cache()
    for row in rows:
        for kind in ("eager", "graph"):
            if kind in row and kind in lstm:
                row[f"{kind}_ratio"] = lstm[kind]["median_ms"] / row[kind]["median_ms"]
    return rows


def _is_in_error() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _fill(
    rows: list[dict[str, Any]], lstm: dict[str, Any], field: Field, contenders: list[Contender], device: str,
    seconds: float,
) -> None:  # fmt: skip
    """Complete the rows, and ``lstm``, the times of ``nn.LSTM``."""
    dtype, tolerance = PRECISIONS[field.precision]
    x = torch.randn(field.length, field.batch, field.size, device=device, dtype=dtype, requires_grad=True)
    entrants: list[tuple[dict[str, Any], nn.Module]] = []
    of_a_kind: dict[tuple[Any, ...], dict[str, Any]] = {}
    twins: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for row, contender in zip(rows, contenders, strict=True):
        layer = _attempt(row, partial(_layer, contender, x))
        if layer is None:
            continue
        row["picked"] = layer[1]
        kind = (contender.cell, contender.feedback, contender.memory_clip, layer[1])
        if kind in of_a_kind:
            twins.append((row, of_a_kind[kind]))
            continue
        of_a_kind[kind] = row
        row["error"] = _attempt(row, partial(_error, layer[0], x[:CHECKED_STEPS].detach()))
        if row["error"] is not None and not row["error"] <= tolerance:
            row["failure"] = f"{WRONG}: off by {row['error']:.1e}"
        if "failure" not in row:
            entrants.append((row, layer[0]))
    # The LSTM comes last: what it fails at, others may do.
    plain = _attempt(lstm, partial(nn.LSTM, field.size, field.size, device=device, dtype=dtype))
    if plain is not None:
        entrants.append((lstm, plain))
    grad = torch.randn_like(x)
    _time("eager", [(row, partial(forward_backward, m, x, grad)) for row, m in entrants], device, seconds)
    if device == "cuda":
        ready = [(row, m) for row, m in entrants if "failure" not in row]
        _time("graph", [(row, partial(graphed, m, x, grad)) for row, m in ready], device, seconds)
    for row, twin in twins:
        row.update({key: value for key, value in twin.items() if key not in asdict(contenders[0])})


def _layer(contender: Contender, x: Tensor) -> tuple[nn.Module, str]:
    """A contender's layer, and the name of the backend that computes it."""
    size = x.size(2)
    if contender.backend == FLASHRNN:
        return FlashRNNLayer(nn.LSTM(size, size, device=x.device, dtype=x.dtype)), FLASHRNN
    rkm = RKM(
        size, size, cell=contender.cell, feedback=None if contender.feedback else False,
        memory_clip=contender.memory_clip, backend=contender.backend, device=x.device, dtype=x.dtype,
    )  # fmt: skip
    cell = resolve_cell(rkm.cell, None if rkm.feedback else False).clipped(rkm.memory_clip)
    parameters = dict(rkm.named_parameters())
    weights = Weights(parameters["weight_ih_l0"], parameters.get("weight_hh_l0"), parameters["bias_l0"])
    picked = pick(contender.backend, cell, x, weights)
    return rkm, next(name for name, backend in BACKENDS.items() if backend is picked)


def _error(layer: nn.Module, x: Tensor) -> float:
    """The largest relative error: outputs at full size, and outputs and gradients of inputs that clip no memory.

    Rounding takes some values across a bound, which changes their gradients.
    """
    if isinstance(layer, FlashRNNLayer):
        exact = copy.deepcopy(layer.lstm).double()
        given, wanted = (
            outcome(module, x.to(dtype))[:2] for module, dtype in ((layer, x.dtype), (exact, torch.double))
        )
        return largest(((g.double() - w).norm() / w.norm()).item() for g, w in zip(given, wanted, strict=True))
    if not isinstance(layer, RKM):
        raise TypeError(type(layer))
    with torch.no_grad():
        output, wanted_output = layer(x)[0].double(), reference_of(layer)(x.double())[0]
    error = ((output - wanted_output).norm() / wanted_output.norm()).item()
    return largest([error, largest_error(layer, x * min(1.0, layer.memory_clip or 1.0) / 4)])


def _time(
    kind: str, entrants: list[tuple[dict[str, Any], Callable[[], Callable[[], Any]]]], device: str, seconds: float
) -> None:
    """Time those that can be prepared and run once."""
    ready = []
    for row, prepare in entrants:
        run = _attempt(row, partial(_warm, prepare, device), kind)
        if run is not None:
            ready.append((row, *run))
    if not ready:
        return
    calls = max(1, min(CALLS, int(1e3 * seconds / 5 / max(first for _, _, first in ready))))
    for (row, _, _), times in zip(ready, timed([run for _, run, _ in ready], device, seconds, calls), strict=True):
        row[kind] = summary(times)


def _warm(prepare: Callable[[], Callable[[], Any]], device: str) -> tuple[Callable[[], Any], float]:
    """The function that is prepared, and the milliseconds of its second call."""
    run = prepare()
    run()
    return run, once(run, device, 1)


def _attempt(row: dict[str, Any], action: Callable[[], Result], kind: str = "eager") -> Result | None:
    """The action's result; None if it fails, and the row says why."""
    try:
        return action()
    except FAILURES as error:
        row["graph_failure" if kind == "graph" else "failure"] = _sentence(error)
        if torch.cuda.is_initialized() and _is_in_error():
            raise
        return None


def _sentence(error: BaseException) -> str:
    text = first_line(error)
    on_cpu = "can't allocate memory" in text
    return OUT_OF_MEMORY if on_cpu or isinstance(error, torch.cuda.OutOfMemoryError) else text[:200]
