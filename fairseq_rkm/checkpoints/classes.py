"""The classes that may stand in a checkpoint of fairseq beside tensors. All hold data and run nothing.

numpy's arrays build themselves from bytes: an array of Python objects would take any bytes for pointers. So stand-ins
read the arrays that translation's ``--eval-bleu`` saves, and :func:`plain` turns stand-ins into arrays of numbers.
"""

import argparse
import collections
import math
from typing import Any

import numpy as np

from fairseq_rkm.errors import RKMError

LARGEST_ARRAY = 1 << 24
"""The most bytes of an array."""


class NumberType:
    """Stand-in for ``numpy.dtype`` of booleans, integers and floating-point numbers.

    Raises:
        RKMError: another type.
    """

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or len(name) > 3 or np.dtype(name).kind not in "biuf":
            raise RKMError(f"an array of {str(name)[:20]!r}, where numbers belong")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise RKMError("an array of records, where numbers belong")
        self.order = state[1]

    @property
    def dtype(self) -> np.dtype:
        """The same type as numpy's own object."""
        return np.dtype(self.name).newbyteorder(self.order)  # type: ignore[arg-type]


class Array:
    """Stand-in for ``numpy.ndarray``. The attribute ``array`` is numpy's array once the bytes have been read."""

    array: Any = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        if not isinstance(kind, NumberType) or type(data) is not bytes or type(shape) is not tuple:
            raise RKMError("an array that is not of numbers")
        if not all(type(size) is int and size >= 0 for size in shape) or len(shape) > 8:
            raise RKMError("an array of an impossible shape")
        if math.prod(shape) * kind.dtype.itemsize != len(data) or len(data) > LARGEST_ARRAY:
            raise RKMError(f"an array of {len(data)} bytes that claims the shape {shape}")
        flat = np.frombuffer(data, kind.dtype).astype(kind.dtype.newbyteorder("="))
        self.array = flat.reshape(shape, order="F" if fortran is True else "C")


def begin_array(*_: Any) -> Array:
    """Stand-in for numpy's ``_reconstruct``, whose arguments tell nothing about the array."""
    return Array()


def number(kind: NumberType, data: bytes | str) -> Any:
    """Stand-in for numpy's ``scalar``. Return a Python number.

    Args:
        kind: the number's type.
        data: its bytes; text stands for bytes in Latin-1, as Python 2 wrote them.

    Raises:
        RKMError: bytes of another length than the type's.
    """
    array = Array()
    array.__setstate__((1, (), kind, False, data))
    return array.array.item()


def plain(value: Any) -> Any:
    """Return numpy's array or type in place of a stand-in, and any other value as it is."""
    if isinstance(value, NumberType):
        return value.dtype
    return value.array if isinstance(value, Array) else value


NUMPY = {
    "numpy.ndarray": Array,
    "numpy.dtype": NumberType,
    **{f"numpy.{core}.multiarray._reconstruct": begin_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": number for core in ("core", "_core")},
    **{f"numpy.dtypes.{kind}DType": NumberType for kind in ("Int64", "Int32", "Float64", "Float32", "Bool")},
}
"""Stand-ins, by the names that numpy 1 and 2 write."""

PYTHON = {
    "argparse.Namespace": argparse.Namespace,  # flags of components that are no dataclasses
    "collections.defaultdict": collections.defaultdict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.int": int,
    "builtins.set": set,
    "builtins.complex": complex,
    "collections.OrderedDict": collections.OrderedDict,
}


def allowed() -> list[Any]:
    """Return the list of (class, name) for ``torch.serialization.safe_globals``."""
    return [(value, name) for name, value in {**PYTHON, **NUMPY}.items()]
