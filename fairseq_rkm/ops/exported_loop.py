"""The recurrence as one loop of PyTorch's own operators, for programs that are exported.

The reference unrolls its loop: a recorded program would have a fixed number of steps. Here the recorder keeps the loop,
and the program takes sequences of any length. ``torch.export``, the newer ONNX exporter and AOTInductor record
PyTorch's ``scan``. ``torch.jit.trace`` and the older ONNX exporter record a loop of TorchScript. Both loops run the
reference's own step: it is traced, not written a second time.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import kernel_candidates, onnx_lstm
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.kernel_candidates import Filters
from fairseq_rkm.ops.ngram import windows
from fairseq_rkm.ops.problem_checks import check, laid_out
from fairseq_rkm.ops.reference import update
from fairseq_rkm.ops.weights import Weights, memory_dtype

Results = tuple[Tensor, Tensor, Tensor]
"""Outputs, hidden state and memory."""
Tensors = dict[str, Tensor]

ROWS = "projected", "real", "anew", "squares"
"""What a step may read of its time: ``W X_t + b``, whether it is real, whether the state begins anew, ``|X_t|^2``."""
WEIGHTS = "recurrent", "norm_weight", "norm_bias", "sigma_i", "sigma_f"
CONSTANTS = *WEIGHTS, "filters", "fresh_hidden", "fresh_memory"
"""What each step may read: weights, a kernel's filters, and the state that a reset begins with."""

TELLS_EXPORTS = hasattr(torch.compiler, "is_exporting")
"""Whether PyTorch tells ``torch.export`` from ``torch.compile`` and records a ``scan``: it does from 2.7 on."""


def is_recording() -> bool:
    """Whether an exporter records the program now."""
    return torch.jit.is_tracing() or is_exporting()


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing; before torch 2.7, which cannot tell, whether anything is."""
    # The compiler of PyTorch 2.11 takes is_exporting() for true whenever it compiles. It reads the flag as it is.
    exporting: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_compiling() if exporting is None else exporting


def recurrence(
    cell: Cell, inputs: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None,
    keep: Tensor | None, reset: Tensor | None = None, fresh: tuple[Tensor | None, Tensor | None] = (None, None),
    ahead: int = 0, memories: bool = False,
) -> Results:  # fmt: skip
    """As :func:`fairseq_rkm.ops.segments.recurrence`, with the mask of the resets, ``(T, B)``.

    With ``memories`` the output is each step's ``c_t``. A program of ``torch.export`` takes one step or more, one of
    TorchScript also none.
    """
    if not torch.jit.is_tracing():  # tracing warns of each comparison
        check(cell, inputs, weights, size, hidden, memory, keep)
    with not_recording():
        ngram = int(weights.input.size(1) // inputs.size(2))
    inputs, weights, hidden, memory = laid_out(inputs, weights, hidden, memory)
    zeros = inputs.new_zeros(inputs.size(1), size)
    hidden = zeros if hidden is None else hidden
    memory = zeros.to(memory_dtype(inputs.dtype), copy=True) if memory is None else memory
    window = windows(inputs, ngram, ahead, reset)
    plain = keep is None and reset is None and not memories
    if plain and torch.onnx.is_in_onnx_export() and onnx_lstm.fits(cell, window, weights):
        return onnx_lstm.recurrence(cell, window, weights, hidden, memory)
    bias, squares, filters = weights.bias, None, None
    if not cell.kernel.is_linear:
        bias, squares = kernel_candidates.product_bias(cell, weights), kernel_candidates.squared(window)
        filters = torch.stack(kernel_candidates.filters_of(cell, weights))
    rows = F.linear(window, weights.input, bias), keep, reset, squares
    begin = [None if f is None else f.to(state.dtype) for f, state in zip(fresh, (hidden, memory), strict=True)]
    read = [dict(zip(weights._fields, weights.tensors(), strict=True)).get(name) for name in WEIGHTS]
    record = _torchscript if torch.jit.is_tracing() else _scan
    given, constants = _given(ROWS, rows), _given(CONSTANTS, (*read, filters, *begin))
    step = _step(cell, size, list(given), list(constants), weights, memories)
    return record(step, given, constants, hidden, memory)


def _given(names: tuple[str, ...], tensors: Sequence[Tensor | None]) -> Tensors:
    """Those that are not None, by their names."""
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def _step(
    cell: Cell, size: int, rows: list[str], constants: list[str], weights: Weights, memories: bool
) -> Callable[..., Results]:
    """The reference's step, with its padding and its resets, as a function ``(*rows, hidden, memory, *constants)``."""

    def step(*tensors: Tensor) -> Results:
        row = dict(zip(rows, tensors[: len(rows)], strict=True))
        hidden, memory = tensors[len(rows) : len(rows) + 2]
        read = dict(zip(constants, tensors[len(rows) + 2 :], strict=True))
        if "anew" in row:
            anew = row["anew"].unsqueeze(1)
            hidden = torch.where(anew, read.pop("fresh_hidden", torch.zeros_like(hidden)), hidden)
            memory = torch.where(anew, read.pop("fresh_memory", torch.zeros_like(memory)), memory)
        filters = Filters(*read.pop("filters").unbind()) if "filters" in read else None
        own = weights._replace(**read)
        new_hidden, new_memory = update(cell, row["projected"], own, hidden, memory, size, filters, row.get("squares"))
        output = new_memory if memories else new_hidden
        if "real" not in row:
            return output, new_hidden, new_memory
        real = row["real"].unsqueeze(1)
        output = torch.where(real, output, torch.zeros_like(output))
        return output, torch.where(real, new_hidden, hidden), torch.where(real, new_memory, memory)

    return step


def _scan(step: Callable[..., Results], rows: Tensors, constants: Tensors, hidden: Tensor, memory: Tensor) -> Results:
    """The loop as PyTorch's ``scan``."""
    if not TELLS_EXPORTS:
        raise RKMError(f"exporting an RKM by torch.export needs PyTorch 2.7 or newer, and this is {torch.__version__}")
    from torch._higher_order_ops.scan import scan

    given = list(constants.values())
    count, used = len(rows), len(rows) + len(given)

    def body(hidden: Tensor, memory: Tensor, *others: Tensor) -> Results:
        output, hidden, memory = step(*others[:count], hidden, memory, *others[count:used])
        return hidden, memory, output.clone()  # the results of a scan must not share memory

    def nested(state: tuple[Tensor, Tensor], now: list[Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, memory, output = body(*state, *now, *given)
        return (hidden, memory), output

    if torch.compiler.is_dynamo_compiling():
        (hidden, memory), output = scan(nested, (hidden.clone(), memory.clone()), list(rows.values()))
    else:  # the operator itself; scan() would compile the body before
        sizes = [batch for batch in (hidden.size(0),) if isinstance(batch, torch.SymInt)]  # for AOTInductor
        apart = _apart(hidden, memory, *rows.values(), *given)
        state, over, fixed = apart[:2], apart[2 : 2 + count], apart[2 + count :]
        hidden, memory, output = torch.ops.higher_order.scan(body, state, over, (*fixed, *sizes))
    return output, hidden, memory


def _apart(*tensors: Tensor) -> list[Tensor]:
    """The tensors, in memory of their own: ``scan`` refuses views of one tensor."""
    seen: set[int] = set()
    results = []
    for tensor in tensors:
        place = tensor.untyped_storage()._cdata
        results.append(tensor.clone() if place in seen else tensor)
        seen.add(place)
    return results


def _torchscript(
    step: Callable[..., Results], rows: Tensors, constants: Tensors, hidden: Tensor, memory: Tensor
) -> Results:
    """The loop as TorchScript's, over a traced step. A tensor that the step does not read stands for a missing one."""
    over = [rows.get(name, rows["projected"]) for name in ROWS]
    fixed = [hidden, memory, *(constants.get(name, hidden) for name in CONSTANTS)]

    def of_all(*tensors: Tensor) -> Results:
        names = *ROWS, "hidden", "memory", *CONSTANTS
        wanted = *rows, "hidden", "memory", *constants
        by_name = dict(zip(names, tensors, strict=True))
        return step(*(by_name[name] for name in wanted))

    # The user has heard of TorchScript's future: by the warning on torch.jit.trace or torch.onnx.export.
    with not_recording(), _without_warnings(DeprecationWarning):
        examples = [tensor.new_zeros(tensor.shape[1:]) for tensor in over] + [tensor.detach() for tensor in fixed]
        loop = _loop_over(torch.jit.trace(of_all, tuple(examples), check_trace=False))
    results: Results = loop(*over, *fixed)
    return results


def checks_of_sizes() -> Any:
    """A context for checks: ``torch.jit.trace`` warns of comparisons, for results might depend on them."""
    return _without_warnings(torch.jit.TracerWarning) if torch.jit.is_tracing() else nullcontext()


@contextmanager
def _without_warnings(category: type[Warning]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _paused(state: Any) -> Iterator[None]:
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def not_recording() -> Any:
    """A context that pauses ``torch.jit.trace``, if it records: sizes are then plain numbers."""
    return _paused(torch._C._get_tracing_state()) if torch.jit.is_tracing() else nullcontext()


def _loop_over(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over ``step``, a function of TorchScript."""

    def loop(
        projected: Tensor, real: Tensor, anew: Tensor, squares: Tensor, hidden: Tensor, memory: Tensor,
        recurrent: Tensor, norm_weight: Tensor, norm_bias: Tensor, sigma_i: Tensor, sigma_f: Tensor, filters: Tensor,
        fresh_hidden: Tensor, fresh_memory: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        outputs = [hidden.unsqueeze(0)[:0]]
        for t in range(projected.size(0)):
            output, hidden, memory = step(
                projected[t], real[t], anew[t], squares[t], hidden, memory, recurrent, norm_weight, norm_bias, sigma_i,
                sigma_f, filters, fresh_hidden, fresh_memory,
            )  # fmt: skip
            outputs.append(output.unsqueeze(0))
        return torch.cat(outputs), hidden, memory

    compiled: Callable[..., Any] = torch.jit.script(loop)
    return compiled
