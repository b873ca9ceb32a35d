"""Triton kernels of ``joined_loop.py``: a step as one kernel, its matrix product included, for a few rows.

A program has some units of all rows of the batch, and all their weights. Its threads split the product's sums: a thread
has 16 bytes of a row of weights at a time, for each of ``DEEP`` rows. The weights of the next round are on their way
while it multiplies. Products are float32 in all precisions: the weights' way from the second-level cache binds.

Step kernels of one recording may overlap (``EARLY``): the next begins before this one ends, and fetches its first
weights and all that no step makes. Then it waits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fairseq_rkm.ops.backends.stepwise.step_kernels import (
    BATCH,
    DONE,
    KEEP,
    MEMORIES,
    STEPS,
    address,
    advance_state,
    fetch_saved,
    forward_gates,
    retreat,
)

FIRST_AXES_FIRST = tl.constexpr(triton.__version__.startswith(("3.5.", "3.6.")))
"""The order in which Triton gives threads to axes after the last: from the first on in 3.6, from the last on in 3.9."""


@triton.jit
def _along(COUNT: tl.constexpr, PLACE: tl.constexpr):
    """The numbers below ``COUNT`` along the axis that is the ``PLACE``-th to get threads, of five, and a sixth."""
    at: tl.constexpr = PLACE if FIRST_AXES_FIRST else 4 - PLACE
    numbers = tl.arange(0, COUNT)
    if at == 0:
        numbers = numbers[:, None, None, None, None, None]
    elif at == 1:
        numbers = numbers[None, :, None, None, None, None]
    elif at == 2:
        numbers = numbers[None, None, :, None, None, None]
    elif at == 3:
        numbers = numbers[None, None, None, :, None, None]
    else:
        numbers = numbers[None, None, None, None, :, None]
    return numbers


@triton.jit
def _columns(SPLIT: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """The columns of a round: a warp's lie together. The axes have the order of ``_product``'s."""
    columns = (_along(SPLIT, 2) * LANES + _along(LANES, 0)) * WIDE
    return columns + tl.arange(0, WIDE)[None, None, None, None, None, :]


@triton.jit
def _product(
    weights, first, numbers, someone, length, ROWS: tl.constexpr, DEEP: tl.constexpr, SPLIT: tl.constexpr,
    UNITS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The products of ``DEEP * UNITS`` rows of weights with ``ROWS`` rows of numbers, ``(ROWS, DEEP, UNITS)``.

    Triton gives threads to one axis after the other. They are therefore ``LANES`` and ``UNITS``, together a warp;
    ``SPLIT``, the warps; ``ROWS`` and ``DEEP``, of which a thread has all; or the other way round. At the end is
    ``WIDE``, a thread's numbers of one fetch. Both operands have all axes, for an axis that is added later would move
    them.

    ``weights`` and ``numbers`` are pointers to the first of the rounds, and ``first`` its weights. ``length``, a row's,
    is a multiple of a round: with masks the compiler fetches late. ``someone`` is 1, or 0 for sums of nothing.
    """
    if FIRST_AXES_FIRST:
        total = tl.zeros((LANES, UNITS, SPLIT, ROWS, DEEP), tl.float32)
    else:
        total = tl.zeros((DEEP, ROWS, SPLIT, UNITS, LANES), tl.float32)
    last = length - SPLIT * LANES * WIDE
    for start in range(0, last * someone, SPLIT * LANES * WIDE):
        following = tl.load(weights + start + SPLIT * LANES * WIDE)
        loaded = tl.load(numbers + start).to(tl.float32)
        total += tl.sum(loaded * first.to(tl.float32), axis=5)
        first = following
    loaded = tl.where(someone > 0, tl.load(numbers + last).to(tl.float32), 0.0)
    total += tl.sum(loaded * first.to(tl.float32), axis=5)
    if FIRST_AXES_FIRST:
        sums = tl.permute(tl.sum(tl.sum(total, axis=0), axis=1), (1, 2, 0))
    else:
        sums = tl.permute(tl.sum(tl.sum(total, axis=4), axis=2), (1, 0, 2))
    # Each thread has all sums. An axis that comes and goes has Triton spread them, and with them the equations.
    return tl.sum(sums[None], axis=0)


@triton.jit
def _of_gate(sums, before, GATE: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr,
             DEEP: tl.constexpr):  # fmt: skip
    """``before``, plus the gate's part of the sums ``(ROWS, DEEP, UNITS)`` if it sees ``h_{t-1}``."""
    value = before
    if GATE >= FIRST_RECURRENT and GATE < FIRST_RECURRENT + RECURRENT:
        mine = tl.arange(0, DEEP)[None, :, None] == GATE - FIRST_RECURRENT
        value += tl.sum(tl.where(mine, sums, 0.0), axis=1)
    return value


@triton.jit(do_not_specialize=["ahead"])
def forward(
    table, weights, fed, ahead, size, length,
    N_GATES: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr,
    FORGET: tl.constexpr, OUTPUT: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr,
    CLIP: tl.constexpr, MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
    DEEP: tl.constexpr, SPLIT: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``c_t``, ``h_t`` and the activated gates of a step, from ``W X_t``, in place, and ``h_{t-1}``.

    ``fed``, ``(2, ROWS, length)``, holds ``h_{t-1}`` for an even step in its first half, and gets ``h_t`` in the other.
    ``weights`` are U, ``(RECURRENT * size, length)``; ``DEEP`` is at least ``RECURRENT``.
    """
    if EARLY:
        if ahead == 0:
            gdc_wait()
        gdc_launch_dependents()
    batch = tl.load(table + BATCH)
    t = tl.load(table + DONE) + ahead
    rows = tl.arange(0, ROWS)[:, None]
    there = rows < batch
    unit = tl.program_id(0) * UNITS
    units = unit + tl.arange(0, UNITS)[None, :] + 0 * rows
    inside = there & (units < size)
    at = t * batch + rows

    gate = _along(DEEP, 4)
    own = unit + _along(UNITS, 1)
    columns = _columns(SPLIT, LANES, WIDE)
    # Padding takes the last unit's or gate's weights, and its sums are not used.
    weights += (tl.minimum(gate, RECURRENT - 1) * size + tl.minimum(own, size - 1)).to(tl.int64) * length + columns
    first = tl.load(weights)
    candidate, f, i, o = forward_gates(
        table, None, at, batch, units, 0, inside, size, size, N_GATES, FIRST_RECURRENT, 0, INPUT, FORGET, OUTPUT,
        HAS_BIAS, NARROW, None,
    )  # fmt: skip
    real = True
    if MASK:
        real = tl.load(address(table, KEEP, tl.uint8) + at, mask=there, other=0) != 0

    if EARLY:
        gdc_wait()
    half = ROWS * length
    now, later = fed + (t % 2) * half, fed + ((t + 1) % 2) * half + rows * length + units
    before = tl.load(address(table, MEMORIES, tl.float32) + at * size + units, mask=inside, other=0.0)
    h_before = before
    if MASK:
        h_before = tl.load(now + rows * length + units, mask=inside, other=0.0).to(tl.float32)
    numbers = now + _along(ROWS, 3) * length + columns + 0 * _along(UNITS, 1)
    sums = _product(weights, first, numbers, 1, length, ROWS, DEEP, SPLIT, UNITS, LANES, WIDE)
    candidate = _of_gate(sums, candidate, 0, FIRST_RECURRENT, RECURRENT, DEEP)
    f = _of_gate(sums, f, FORGET, FIRST_RECURRENT, RECURRENT, DEEP)
    i = _of_gate(sums, i, INPUT, FIRST_RECURRENT, RECURRENT, DEEP)
    o = _of_gate(sums, o, OUTPUT, FIRST_RECURRENT, RECURRENT, DEEP)
    advance_state(
        table, candidate, f, i, o, before, h_before, real, later, at, batch, units, inside, size, N_GATES, INPUT,
        FORGET, OUTPUT, SQUASH_CANDIDATE, SQUASH_OUTPUT, CLIP, MASK, False, 0.0, NARROW, None, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["ahead"])
def backward(
    table, weights, sums, fed, carry, held, ahead, size, length,
    N_GATES: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr,
    FORGET: tl.constexpr, OUTPUT: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr,
    CLIP: tl.constexpr, MASK: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, NARROW: tl.constexpr, ROWS: tl.constexpr,
    DEEP: tl.constexpr, SPLIT: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """The gates' gradients of a step, counted from the last, from the gradients of the step after it.

    ``fed``, ``(2, ROWS, length)``, holds the recurrent gates' for an even count in its first half, and gets this
    step's in the other. ``weights`` are U transposed, ``(size, length)``. ``sums``, ``(ROWS, size)``, are the
    gradients of the last h from outside; ``carry`` and ``held`` are as ``step_kernels.py`` has them.
    """
    if EARLY:
        if ahead == 0:
            gdc_wait()
        gdc_launch_dependents()
    batch = tl.load(table + BATCH)
    count = tl.load(table + DONE) + ahead
    t = tl.load(table + STEPS) - 1 - count
    rows = tl.arange(0, ROWS)[:, None]
    there = rows < batch
    unit = tl.program_id(0) * (DEEP * UNITS)
    units = unit + tl.arange(0, DEEP * UNITS)[None, :] + 0 * rows
    inside = there & (units < size)
    at = t * batch + rows
    place = rows * size + units

    own = unit + _along(DEEP, 4) * UNITS + _along(UNITS, 1)
    columns = _columns(SPLIT, LANES, WIDE)
    weights += tl.minimum(own, size - 1).to(tl.int64) * length + columns
    first = tl.load(weights)
    candidate, f, i, o, before, now, to_output = fetch_saved(
        table, at, batch, units, inside, size, N_GATES, INPUT, FORGET, OUTPUT, HAS_GRAD_OUTPUT, NARROW
    )  # fmt: skip
    real = True
    if MASK:
        real = tl.load(address(table, KEEP, tl.uint8) + at, mask=there, other=0) != 0
    to_h = tl.load(sums + place, mask=inside & (rows + count < rows + 1), other=0.0)

    if EARLY:
        gdc_wait()
    half = ROWS * length
    given, made = fed + (count % 2) * half, fed + ((count + 1) % 2) * half
    # Fetched before the product: its sums over warps keep the threads that fetch apart from the ones that store.
    to_c = tl.load(carry + place, mask=inside, other=0.0)
    passing = to_c
    if MASK:
        passing = tl.load(held + place, mask=inside, other=0.0)
    numbers = given + _along(ROWS, 3) * length + columns + 0 * _along(UNITS, 1)
    someone = tl.where(count > 0, 1, 0)
    sums = _product(weights, first, numbers, someone, length, ROWS, DEEP, SPLIT, UNITS, LANES, WIDE)
    to_h += tl.reshape(sums, (ROWS, DEEP * UNITS))
    retreat(
        table, made, carry, held, to_h, to_c, passing, candidate, f, i, o, before, now, to_output, real, t, at, place,
        rows * length, batch, units, inside, size, size, N_GATES, FIRST_RECURRENT, RECURRENT, INPUT, FORGET, OUTPUT,
        SQUASH_CANDIDATE, SQUASH_OUTPUT, CLIP, MASK, HAS_GRAD_OUTPUT, False, NARROW, None, None, 0, -1, -1, -1, -1, -1,
        -1,
    )  # fmt: skip


@triton.jit
def transpose(source, into, rows, columns, pitch, BLOCK: tl.constexpr):
    """``(rows, columns)`` to ``(columns, rows)`` with rows of length ``pitch``."""
    down = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = (down < rows)[:, None] & (across < columns)[None, :]
    tile = tl.load(source + down[:, None].to(tl.int64) * columns + across[None, :], mask=here, other=0.0)
    there = (across < columns)[:, None] & (down < rows)[None, :]
    tl.store(into + across[:, None].to(tl.int64) * pitch + down[None, :], tl.trans(tile), mask=there)
