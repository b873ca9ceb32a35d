"""The tensors of one layer and direction, in the form for all backends."""

from typing import NamedTuple

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
        sigma_i: ``s_i``, a scalar tensor or a number; only cells with a constant input scale read it.
        sigma_f: ``s_f``, ``(d,)`` or a number; only cells with a constant memory scale read it.
        kernel_scale: s of the candidate's kernel, ``(d,)``, or None for a kernel without.
        kernel_offset: b of the candidate's kernel, ``(d,)``, or None for a kernel without.
    """

    input: Tensor
    recurrent: Tensor | None = None
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    sigma_i: Tensor | float = 0.5
    sigma_f: Tensor | float = 0.5
    kernel_scale: Tensor | None = None
    kernel_offset: Tensor | None = None

    def widened(self, wide: torch.dtype) -> "Weights":
        """The same weights in another dtype."""
        return Weights(*(v.to(wide) if isinstance(v, Tensor) else v for v in self))  # type: ignore[arg-type]

    def laid_out(self, wide: torch.dtype) -> "Weights":
        """The same weights, contiguous in memory, as backends read them.

        The layer norm, the scales and the kernel act on the memory: they get its dtype, ``wide``.
        """
        narrow, others = self[:3], self[3:]
        return Weights(
            *(None if v is None else v.contiguous() for v in narrow),  # type: ignore[arg-type]
            *(v.to(wide).contiguous() if isinstance(v, Tensor) else v for v in others),
        )

    def present(self) -> list[Tensor]:
        """The matrices, the bias and the layer norm's weights that there are."""
        return [weight for weight in self[:5] if weight is not None]

    def tensors(self) -> list[Tensor | None]:
        """The fields in order, for autograd to save; None stands for a plain number."""
        return [None if isinstance(value, float) else value for value in self]


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ``c_t``: the inputs', but never below float32."""
    return torch.promote_types(dtype, torch.float32)
