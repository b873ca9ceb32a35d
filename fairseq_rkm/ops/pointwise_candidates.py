"""All steps' candidates through a kernel other than the linear one, in one launch, and their gradients in one.

PyTorch's operations on ``(T, B, d)`` numbers, some ten forward and twenty backward, take longer than a scan over the
steps. :mod:`fairseq_rkm.ops.kernel_candidates` is the same in PyTorch.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.ops.kernel_functions import Kernel, slopes_of
from fairseq_rkm.triton_presence import INTERPRETED, has_triton

MOST_UNITS_AT_ONCE = 512
"""The units that a program takes at a time."""
MOST_PROGRAMS = 1024
"""The most programs backward: each has sums of its own over its rows, of 8 MB together."""
SUMS = ("bias", "filters", "scale", "offset")


def takes(gates: Tensor) -> bool:
    """Whether candidates are taken here: of 16 bits or float32, on a GPU with Triton, or in its interpreter."""
    narrow = gates.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return narrow and (gates.is_cuda or INTERPRETED) and gates.is_contiguous() and gates.numel() > 0 and has_triton()


def take(kernel: Kernel, gates: Tensor, filters: Tensor, windows: Tensor | None) -> None:
    """Take candidates through a kernel.

    Args:
        kernel: the kernel.
        gates: ``(T, B, G * d)``; :func:`takes` them. The first d of each row hold ``w^T X_t``, and get ``c~_t``
            before a squashing.
        filters: ``|w|^2``, s, b and the bias, ``(4, d)`` float32.
        windows: ``|X_t|^2``, ``(T, B, 1)`` float32; None for a kernel that reads none.
    """
    size, value = filters.size(1), _written(kernel).value
    block = _block(size)
    grid = gates.size(0) * gates.size(1), -(-size // block)
    _launch(
        "forward", grid, gates, filters, _or(windows, filters), size, gates.size(2), VALUE=value,
        WINDOWS=windows is not None, BLOCK=block,
    )  # fmt: skip


def differentiate(
    kernel: Kernel, grads: Tensor, dots: Tensor, filters: Tensor, windows: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Take the gradients of candidates to those of ``w^T X_t``.

    Args:
        kernel: the kernel.
        grads: ``(T, B, G * d)``; :func:`takes` them. The first d of each row hold the gradient of ``c~_t`` before a
            squashing, and get that of ``w^T X_t``.
        dots: ``w^T X_t``, ``(T, B, d)``.
        filters: as :func:`take` has them.
        windows: as :func:`take` has them.

    Returns:
        The gradients of :data:`SUMS` over all steps, ``(d,)`` float32 each; and of each ``|X_t|^2``, ``(T, B, 1)``,
        None without ``windows``.
    """
    steps, batch, size = dots.shape
    rows, block = steps * batch, _block(size)
    parts = -(-size // block)
    each = -(-rows // max(1, MOST_PROGRAMS // parts))
    grid = -(-rows // each), parts
    totals = filters.new_empty(grid[0], len(SUMS), size)
    shares = None if windows is None else filters.new_empty(steps, batch, grid[1])
    _launch(
        "backward", grid, grads, dots.contiguous(), filters, _or(windows, filters), _or(shares, filters), totals, rows,
        each, size, grads.size(2), SLOPES=_written(kernel).slopes, WINDOWS=windows is not None, BLOCK=block,
    )  # fmt: skip
    found = dict(zip(SUMS, totals.sum(0), strict=True))
    return found, None if shares is None else shares.sum(-1, keepdim=True)


def reads_windows(kernel: Kernel) -> bool:
    """Whether a kernel reads ``|z|^2``."""
    return "windows" in slopes_of(kernel)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's argument; any tensor serves in place of None, as the kernel is compiled not to read it."""
    return other if tensor is None else tensor


def _block(size: int) -> int:
    return min(MOST_UNITS_AT_ONCE, 1 << (size - 1).bit_length())


def _written(kernel: Kernel) -> Any:
    """The kernel's functions in Triton; importing them takes Triton."""
    from fairseq_rkm.ops.triton_kernel_functions import written

    return written(kernel)


def _launch(name: str, grid: tuple[int, ...], first: Tensor, *arguments: Any, **flags: Any) -> None:
    from fairseq_rkm.ops import pointwise_candidate_kernels

    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        getattr(pointwise_candidate_kernels, name)[grid](first, *arguments, **flags, num_warps=4)
