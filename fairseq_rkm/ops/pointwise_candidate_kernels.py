"""Triton kernels of ``pointwise_candidates.py``: all steps' candidates through a kernel, and their gradients.

A row is a step of a sequence. FILTERS hold ``|w|^2``, s, b and the bias of each unit. All numbers are float32 within.
"""

import triton
import triton.language as tl


@triton.jit
def _of_filters(filters, units, inside, size):
    """``|w|^2``, s, b and the bias of a block of units; beyond the layer's end numbers that do no harm."""
    squares = tl.load(filters + units, mask=inside, other=1.0)
    scale = tl.load(filters + size + units, mask=inside, other=1.0)
    offset = tl.load(filters + 2 * size + units, mask=inside, other=0.0)
    bias = tl.load(filters + 3 * size + units, mask=inside, other=0.0)
    return squares, scale, offset, bias


@triton.jit
def forward(gates, filters, windows, size, pitch, VALUE: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr):
    """``c~_t`` in place of ``w^T X_t``, the first ``size`` numbers of each row of ``gates``."""
    row = tl.program_id(0).to(tl.int64)
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = units < size
    squares, scale, offset, bias = _of_filters(filters, units, inside, size)
    dot = tl.load(gates + row * pitch + units, mask=inside, other=0.0).to(tl.float32)
    of_window = tl.zeros_like(dot)
    if WINDOWS:
        of_window += tl.load(windows + row)
    tl.store(gates + row * pitch + units, VALUE(dot, squares, of_window, scale, offset) + bias, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def backward(
    grads, dots, filters, windows, shares, totals, rows, each, size, pitch, SLOPES: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of ``w^T X_t`` in place of that of ``c~_t``, the first ``size`` numbers of each row of ``grads``.

    A program takes ``each`` rows and a block of units. ``totals``, ``(programs, 4, size)``, gets its sums over the
    rows: of the gradients of the bias, ``|w|^2``, s and b. ``shares``, ``(rows, blocks)``, gets the block's share of
    that of ``|X_t|^2``.
    """
    first = tl.program_id(0).to(tl.int64) * each
    units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = units < size
    squares, scale, offset, _ = _of_filters(filters, units, inside, size)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_squares = tl.zeros((BLOCK,), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    of_offset = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + each, rows)):
        dot = tl.load(dots + row * size + units, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grads + row * pitch + units, mask=inside, other=0.0).to(tl.float32)
        of_window = tl.zeros_like(dot)
        if WINDOWS:
            of_window += tl.load(windows + row)
        by_dot, by_squares, by_window, by_scale, by_offset = SLOPES(dot, squares, of_window, scale, offset)
        of_bias += grad
        of_squares += grad * by_squares
        of_scale += grad * by_scale
        of_offset += grad * by_offset
        if WINDOWS:
            share = tl.sum(tl.where(inside, grad * by_window, 0.0), axis=0)
            tl.store(shares + row * tl.num_programs(1) + tl.program_id(1), share)
        tl.store(grads + row * pitch + units, grad * by_dot, mask=inside)
    own = totals + tl.program_id(0).to(tl.int64) * 4 * size + units
    tl.store(own, of_bias, mask=inside)
    tl.store(own + size, of_squares, mask=inside)
    tl.store(own + 2 * size, of_scale, mask=inside)
    tl.store(own + 3 * size, of_offset, mask=inside)
