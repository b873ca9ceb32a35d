"""The kernels of ``kernel_functions.py`` as functions of Triton, written from the functions of tensors there.

A function of tensors runs once, on numbers that stand in for tensors. Each operation on them writes a line of Triton.
"""

import functools
import linecache
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fairseq_rkm.ops import triton_functions
from fairseq_rkm.ops.kernel_functions import Kernel, Terms


def _operation(form: str) -> Callable[..., "Number"]:
    """A method of :class:`Number` that writes a line: ``{0}`` is the number itself, the others are arguments."""

    def write(self: "Number", *others: "Number | float") -> "Number":
        return self.write(form.format(self, *others))

    return write


class Number:
    """A name in a Triton function that is being written, in place of a tensor of float32.

    Attributes:
        dtype: that of the tensors.
    """

    dtype = torch.float32

    def __init__(self, lines: list[str], name: str) -> None:
        self._lines, self._name = lines, name

    def __str__(self) -> str:
        return self._name

    def write(self, value: str) -> "Number":
        """A further line, and the name of its value."""
        name = f"v{len(self._lines)}"
        self._lines.append(f"{name} = {value}")
        return Number(self._lines, name)

    def __pow__(self, exponent: int) -> "Number | float":
        return self.write(" * ".join([str(self)] * exponent)) if exponent else 1.0

    __add__, __radd__ = _operation("{0} + {1}"), _operation("{1} + {0}")
    __sub__, __rsub__ = _operation("{0} - {1}"), _operation("{1} - {0}")
    __mul__, __rmul__ = _operation("{0} * {1}"), _operation("{1} * {0}")
    __truediv__, __rtruediv__ = _operation("{0} / {1}"), _operation("{1} / {0}")
    __and__, __gt__, __ge__ = _operation("{0} & {1}"), _operation("{0} > {1}"), _operation("{0} >= {1}")
    __neg__, __invert__, abs = _operation("-{0}"), _operation("~{0}"), _operation("tl.abs({0})")
    clamp = _operation("clamp({0}, {1}, {2})")
    sqrt = _operation("tl.sqrt_rn({0})")  # tl.sqrt takes the smallest numbers for 0

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, arguments: Any = (), _keywords: Any = None) -> Any:
        return _FUNCTIONS[function](*arguments)


def _where(truth: Number, value: "Number | float", other: "Number | float") -> Number:
    return truth.write(f"tl.where({truth}, {value}, {other})")


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.acos: lambda number: number.write(f"acos({number})"),
    torch.exp: lambda number: number.write(f"tl.exp({number})"),
    torch.ones_like: lambda _number: 1.0,
    torch.where: _where,
    torch.zeros_like: lambda _number: 0.0,
}


class Written(NamedTuple):
    """A kernel's functions of :class:`Terms`, each a block of float32, in Triton.

    Attributes:
        value: its value.
        slopes: its :class:`~fairseq_rkm.ops.kernel_functions.Slopes`, 0 for those that are None.
    """

    value: Any
    slopes: Any


@functools.cache
def written(kernel: Kernel) -> Written:
    """A kernel's functions in Triton."""
    return Written(
        _function(f"{kernel.key}_value", lambda terms: [kernel.value(terms)]),
        _function(f"{kernel.key}_slopes", kernel.slopes),
    )


def _terms(lines: list[str]) -> Any:
    return Terms(*(Number(lines, name) for name in Terms._fields))  # type: ignore[arg-type]


def _function(name: str, function: Any) -> Any:
    """A function of :class:`Terms` in Triton; ``inspect`` finds its text in ``linecache``, as Triton asks it to."""
    lines: list[str] = []
    results = ", ".join("0.0" if result is None else str(result) for result in function(_terms(lines)))
    body = "".join(f"    {line}\n" for line in [*lines, f"return {results}"])
    text = f"@triton.jit\ndef {name}({', '.join(Terms._fields)}):\n{body}"
    file = f"<{__name__}.{name}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    names = {
        "__name__": __name__, "triton": triton, "tl": tl, "acos": triton_functions.acos,
        "clamp": triton_functions.clamp,
    }  # fmt: skip
    exec(compile(text, file, "exec"), names)  # noqa: S102 - its text is written above, from this package's own kernels
    return names[name]
