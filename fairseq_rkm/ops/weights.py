"""The tensors of one layer in one direction, as every backend takes them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5


class Weights(NamedTuple):
    """One layer's weights, gates stacked in the order of ``cell.gates``.

    Attributes:
        input: ``(gates * d, n * m)``; columns ``[0:m]`` multiply the window's newest input.
        recurrent: ``(recurrent_gates * d, d)``, or None without feedback.
        bias: ``(gates * d,)`` or None.
        norm_weight: ``(d,)``, gain of the layer norm on the memory, or None.
        norm_bias: ``(d,)``, its bias, or None.
        sigma_i: ``s_i``, a scalar tensor or a number; read only by cells whose input scale is constant.
        sigma_f: ``s_f``, ``(d,)`` or a number; read only by cells whose memory scale is constant.
    """

    input: Tensor
    recurrent: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    sigma_i: Tensor | float = 0.5
    sigma_f: Tensor | float = 0.5

    def laid_out(self, wide: torch.dtype) -> "Weights":
        """The same as backends read them, a tensor's elements one after the other in memory.

        The layer norm's and the scales' tensors, which act on the memory, are in its type, ``wide``.
        """
        tensors: list[Any] = [v.to(wide) if i > 2 and isinstance(v, Tensor) else v for i, v in enumerate(self)]
        return Weights(*(v.contiguous() if isinstance(v, Tensor) else v for v in tensors))

    def numbers(self) -> dict[str, float]:
        """The fields that are plain numbers."""
        return {name: value for name, value in zip(self._fields, self, strict=True) if isinstance(value, float)}

    def tensors(self) -> list[Tensor | None]:
        """The fields in order, None in the place of plain numbers: what autograd can save."""
        return [None if isinstance(value, float) else value for value in self]


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which ``c_t`` is kept: that of the inputs, but never below float32."""
    return torch.promote_types(dtype, torch.float32)
