"""A backend's passes over a stretch of time: its loops alone, in memory that is given.

Layers of a stack that run side by side (:mod:`fairseq_rkm.ops.wavefront`) are made of them.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Pair = tuple[Tensor | None, Tensor | None]
"""Of hidden state and memory, ``(B, d)`` each; None stands for zeros."""


class Way(NamedTuple):
    """A way for a layer to take a part of the GPU.

    Attributes:
        rows: the rows of the batch that a block takes.
        beside: the number of such layers that run at the same time.
        step_time: the estimated microseconds of a step, forward and backward.
    """

    rows: int
    beside: int
    step_time: float


class Stretches(NamedTuple):
    """What a backend does for layers side by side. All tensors are contiguous.

    Attributes:
        forward: ``(cell, weights, keep, gates, first, last, hiddens, memories, rows)``. ``gates``, ``(T, B, G * d)``,
            hold the inputs' products, without the bias, and become the activated gates. The states before the stretch
            are ``first``; the states behind it are written to ``last``. All ``h_t`` and ``c_t`` go to ``hiddens`` and
            ``memories``, ``(T + 1, B, d)``, the first ones included.
        backward: ``(cell, weights, keep, gates, memories, grad_output, last, first, grad_gates, rows)``. ``last`` are
            the gradients of the states behind the stretch, in the memory's dtype; those of the states before it are
            written to ``first``, and those of the pre-activations to ``grad_gates``. ``grad_output`` may be None.
        ways: ``(cell, size, batch, device)`` to the list of :class:`Way` by which two layers or more run side by side.
        are_compiled: ``(cell, size, dtype, rows, mask, device)``, whether both passes are ready for a CUDA graph.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    ways: Callable[..., list[Way]]
    are_compiled: Callable[..., bool]
