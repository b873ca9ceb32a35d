"""Align the rows of matrices for fast products.

On GPUs, rows of a product's matrices should all be a multiple of 16 bytes long. Otherwise the product takes three
times as long on an H200. On CPUs, the result's rows should be a multiple of 32 bytes. Otherwise MKL takes 1.4 times as
long. Other matrices are copied for the time of the product; on a GPU, one launch copies all of a pass
(``alignment.cu``).
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops.compilation import nvrtc

GPU_BYTES, CPU_BYTES = 16, 32
SOURCE = Path(__file__).with_suffix(".cu")
AT_ONCE, THREADS, BLOCKS_EACH = 3, 256, 4
"""The matrices of a launch, the threads of a block, and the blocks of a multiprocessor; all are resident at once."""


def align_rows(*matrices: Tensor) -> list[Tensor]:
    """Pad each matrix with zero columns up to aligned rows; aligned ones are returned themselves.

    Args:
        matrices: ``(..., n)`` of one dtype and device.
    """
    return _align_rows(matrices, None)


def clear_and_align_rows(workspace: Tensor, *matrices: Tensor) -> list[Tensor]:
    """:func:`align_rows`, and the workspace, of int32, filled with -1: on a GPU in the same launch."""
    return _align_rows(matrices, workspace)


def _align_rows(matrices: Sequence[Tensor], workspace: Tensor | None) -> list[Tensor]:
    columns = (GPU_BYTES if matrices[0].is_cuda else CPU_BYTES) // matrices[0].element_size()
    padding = [-m.size(-1) % columns for m in matrices]
    if not any(padding):
        if workspace is not None:
            workspace.fill_(-1)
        return list(matrices)
    if not matrices[0].is_cuda or nvrtc.available() is not None:
        if workspace is not None:
            workspace.fill_(-1)
        return [F.pad(m, (0, p)) if p else m for m, p in zip(matrices, padding, strict=True)]
    results = [m.new_empty(*m.shape[:-1], m.size(-1) + p) if p else m for m, p in zip(matrices, padding, strict=True)]
    copies = [(m, r, m.size(-1)) for m, r, p in zip(matrices, results, padding, strict=True) if p]
    words = 0 if workspace is None else workspace.numel()
    for start in range(0, len(copies), AT_ONCE):
        _launch("align_rows", copies[start : start + AT_ONCE], *((None, 0) if start else (workspace, words)))
    return results


def unalign_rows(matrices: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Undo :func:`align_rows`: cut each result to its number of columns; on a GPU contiguous."""
    if not matrices or not matrices[0][0].is_cuda or nvrtc.available() is not None:
        return [m if m.size(-1) == size else m[..., :size] for m, size in matrices]
    results = [m if m.size(-1) == size else m.new_empty(*m.shape[:-1], size) for m, size in matrices]
    copies = [(m, result, size) for (m, size), result in zip(matrices, results, strict=True) if result is not m]
    for start in range(0, len(copies), AT_ONCE):
        _launch("unalign_rows", copies[start : start + AT_ONCE])
    return results


def align(inputs: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
    """Align extended inputs, ``(T + n - 1, B, m)``, each input's part of their weight, and others.

    Args:
        inputs: of m columns.
        weight: ``(G, n * m)``; the result is ``(G, n * m')``, with m' for m rounded up.
        others: ``(..., n)``.
    """
    return _align((inputs, weight, *others), None)


def clear_and_align(workspace: Tensor, inputs: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
    """:func:`align`, and the workspace, of int32, filled with -1: on a GPU in the same launch."""
    return _align((inputs, weight, *others), workspace)


def _align(matrices: Sequence[Tensor], workspace: Tensor | None) -> list[Tensor]:
    if _are_aligned(matrices):
        if workspace is not None:
            workspace.fill_(-1)
        return list(matrices)
    inputs, weight, *others = matrices
    size = inputs.size(-1)
    if weight.size(1) == size:
        return _align_rows(matrices, workspace)
    inputs, weight, *others = _align_rows((inputs, weight.unflatten(1, (-1, size)), *others), workspace)
    return [inputs, weight.flatten(1), *others]


def _are_aligned(matrices: Sequence[Tensor]) -> bool:
    """Whether rows are aligned; with those of the inputs, so is each input's part of their weight."""
    first = matrices[0]
    columns = (GPU_BYTES if first.is_cuda else CPU_BYTES) // first.element_size()
    if first.size(-1) % columns:
        return False
    return not any(matrix.size(-1) % columns for matrix in matrices[2:])


def _launch(name: str, copies: list[tuple[Tensor, Tensor, int]], *more: Tensor | int | None) -> None:
    """Copy so many columns of each first tensor to the second; the kernel gets the arguments ``more`` too."""
    arguments: list[Tensor | int | None] = []
    sources = [source.contiguous() for source, _, _ in copies]  # kept alive until the launch
    for source, (_, result, size) in zip(sources, copies, strict=True):
        arguments += [source, result, source.numel() // source.size(-1), size]
    arguments += [None, None, 0, 0] * (AT_ONCE - len(copies))
    kernel, blocks = _kernel(name, sources[0].element_size(), sources[0].device.index)
    kernel.launch(blocks, THREADS, *arguments, *more)


@functools.cache
def _kernel(name: str, element: int, device: int) -> tuple[nvrtc.Kernel, int]:
    """A kernel of ``alignment.cu`` and the blocks to launch."""
    kernel = nvrtc.compile_kernel(SOURCE, name, (("ELEMENT", element),), 0, device)
    return kernel, BLOCKS_EACH * torch.cuda.get_device_properties(device).multi_processor_count
