"""Rows that begin where fast matrix products want them.

On GPUs they are to be whole 16 bytes long, in all of a product's matrices: without, a product takes three times as long
on an H200. On CPUs the result's are to be whole 32 bytes: without, MKL takes 1.4 times as long. What is not aligned is
copied for the product's time only, on a GPU all matrices of a pass in one launch (``alignment.cu``).
"""

import functools
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
    pairs = [(m, r) for m, r, p in zip(matrices, results, padding, strict=True) if p]
    for start in range(0, len(pairs), AT_ONCE):
        _launch(pairs[start : start + AT_ONCE])
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


def unalign(weight: Tensor, size: int, aligned: int) -> Tensor:
    """A weight ``(G, n * aligned)`` without the columns that :func:`align` added, ``(G, n * size)``."""
    return weight if aligned == size else weight.unflatten(1, (-1, aligned))[..., :size].flatten(1)


def _launch(pairs: list[tuple[Tensor, Tensor]]) -> None:
    first = pairs[0][0]
    contiguous = [source.contiguous() for source, _ in pairs]
    arguments: list[Tensor | int | None] = []
    for source, (_, result) in zip(contiguous, pairs, strict=True):
        arguments += [source, result, source.numel() // source.size(-1), source.size(-1)]
    arguments += [None, None, 0, 0] * (AT_ONCE - len(pairs))
    kernel = nvrtc.compile_kernel(SOURCE, "align_rows", (("ELEMENT", first.element_size()),), 0, first.device.index)
    kernel.launch(BLOCKS_EACH * _multiprocessors(first.device.index), THREADS, *arguments)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
