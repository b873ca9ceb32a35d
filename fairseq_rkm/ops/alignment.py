"""Rows that begin where fast matrix products want them.

On GPUs they are to be whole 16 bytes long, in all of a product's matrices: without, a product takes three times as long
on an H200. On CPUs the result's are to be whole 32 bytes: without, MKL takes 1.4 times as long. What is not aligned is
copied for the product's time only, on a GPU all matrices of a pass in one launch (``alignment.cu``).
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops import nvrtc

GPU_BYTES, CPU_BYTES = 16, 32
SOURCE = Path(__file__).with_suffix(".cu")
AT_ONCE, THREADS, BLOCKS_EACH = 3, 256, 4
"""Matrices and threads of a launch, and its blocks for each multiprocessor, which are all resident at once."""


def align_rows(*matrices: Tensor) -> list[Tensor]:
    """Each matrix with zero columns up to aligned rows: itself if it has them.

    Args:
        matrices: ``(..., n)`` of one dtype.
    """
    padding = [-m.size(-1) % ((GPU_BYTES if m.is_cuda else CPU_BYTES) // m.element_size()) for m in matrices]
    if not any(padding):
        return list(matrices)
    if not matrices[0].is_cuda or nvrtc.available() is not None:
        return [F.pad(m, (0, p)) if p else m for m, p in zip(matrices, padding, strict=True)]
    results = [m.new_empty(*m.shape[:-1], m.size(-1) + p) if p else m for m, p in zip(matrices, padding, strict=True)]
    _launch("align_rows", [(m, r, m.size(-1)) for m, r, p in zip(matrices, results, padding, strict=True) if p])
    return results


def unalign_rows(matrices: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """What :func:`align_rows` was given, from its results and the numbers of columns; on a GPU contiguous."""
    if not matrices or not matrices[0][0].is_cuda or nvrtc.available() is not None:
        return [m if m.size(-1) == size else m[..., :size] for m, size in matrices]
    results = [m if m.size(-1) == size else m.new_empty(*m.shape[:-1], size) for m, size in matrices]
    pairs = zip(matrices, results, strict=True)
    _launch("unalign_rows", [(m, result, size) for (m, size), result in pairs if result is not m])
    return results


def align(inputs: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
    """:func:`align_rows` of extended inputs ``(T + n - 1, B, m)``, of each input's part of their weight, and of others.

    Args:
        inputs: m columns.
        weight: ``(G, n * m)``; the result is ``(G, n * m')``, m' being m rounded up.
        others: ``(..., n)``.
    """
    size = inputs.size(-1)
    inputs, weight, *others_aligned = align_rows(inputs, weight.unflatten(1, (-1, size)), *others)
    return [inputs, weight.flatten(1), *others_aligned]


def _launch(name: str, copies: list[tuple[Tensor, Tensor, int]]) -> None:
    """Copy each first tensor to the second, as many of their columns as the number says."""
    for start in range(0, len(copies), AT_ONCE):
        part = copies[start : start + AT_ONCE]
        sources = [source.contiguous() for source, _, _ in part]
        arguments: list[Tensor | int | None] = []
        for source, (_, result, size) in zip(sources, part, strict=True):
            arguments += [source, result, source.numel() // source.size(-1), size]
        arguments += [None, None, 0, 0] * (AT_ONCE - len(part))
        first = sources[0]
        kernel = nvrtc.compile_kernel(SOURCE, name, (("ELEMENT", first.element_size()),), 0, first.device.index)
        kernel.launch(BLOCKS_EACH * _multiprocessors(first.device.index), THREADS, *arguments)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
