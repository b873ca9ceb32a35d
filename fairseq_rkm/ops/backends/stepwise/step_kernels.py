"""Triton kernels of ``stepwise.py``: all of a step but its matrix product.

A program has one row of the batch and ``BLOCK`` units; with layer normalisation all units. The tensors of a sequence
are found through a table of addresses in the GPU's memory. A CUDA graph of these kernels therefore serves any sequence.
The number of a step is the table's ``DONE`` plus the launch's ``ahead``.
"""

import triton
import triton.language as tl

from fairseq_rkm.ops.triton_functions import clamp, tanh

DONE = tl.constexpr(0)
STEPS = tl.constexpr(1)
BATCH = tl.constexpr(2)
FIRST_ADDRESS = 3
GATES = tl.constexpr(3)
MEMORIES = tl.constexpr(4)
HIDDENS = tl.constexpr(5)
KEEP = tl.constexpr(6)
BIAS = tl.constexpr(7)
SCALE_I = tl.constexpr(8)
SCALE_F = tl.constexpr(9)
GAIN = tl.constexpr(10)
SHIFT = tl.constexpr(11)
MOMENTS = tl.constexpr(12)
GRAD_OUTPUT = tl.constexpr(13)
GRAD_GATES = tl.constexpr(14)
GRAD_GAIN = tl.constexpr(15)
GRAD_SHIFT = tl.constexpr(16)
FILTERS = tl.constexpr(17)
WINDOWS = tl.constexpr(18)
SHARES = tl.constexpr(19)
TOTALS = tl.constexpr(20)
ENTRIES = 21
"""The entries of the table; each address is a row's of this list."""


@triton.jit(do_not_specialize=["steps", "batch"])
def fill(
    table, gates, memories, hiddens, keep, bias, scale_i, scale_f, gain, shift, moments, grad_output, grad_gates,
    grad_gain, grad_shift, filters, windows, shares, totals, steps, batch,
):  # fmt: skip
    """Begin a sequence: its length, its rows and its tensors."""
    tl.store(table + DONE, 0)
    tl.store(table + STEPS, steps)
    tl.store(table + BATCH, batch)
    tl.store(table + GATES, gates.to(tl.int64))
    tl.store(table + MEMORIES, memories.to(tl.int64))
    tl.store(table + HIDDENS, hiddens.to(tl.int64))
    tl.store(table + KEEP, keep.to(tl.int64))
    tl.store(table + BIAS, bias.to(tl.int64))
    tl.store(table + SCALE_I, scale_i.to(tl.int64))
    tl.store(table + SCALE_F, scale_f.to(tl.int64))
    tl.store(table + GAIN, gain.to(tl.int64))
    tl.store(table + SHIFT, shift.to(tl.int64))
    tl.store(table + MOMENTS, moments.to(tl.int64))
    tl.store(table + GRAD_OUTPUT, grad_output.to(tl.int64))
    tl.store(table + GRAD_GATES, grad_gates.to(tl.int64))
    tl.store(table + GRAD_GAIN, grad_gain.to(tl.int64))
    tl.store(table + GRAD_SHIFT, grad_shift.to(tl.int64))
    tl.store(table + FILTERS, filters.to(tl.int64))
    tl.store(table + WINDOWS, windows.to(tl.int64))
    tl.store(table + SHARES, shares.to(tl.int64))
    tl.store(table + TOTALS, totals.to(tl.int64))


@triton.jit(do_not_specialize=["count"])
def advance(table, count):
    """Add ``count`` to the steps that are done."""
    tl.store(table + DONE, tl.load(table + DONE) + count)


@triton.jit
def address(table, ENTRY: tl.constexpr, TYPE: tl.constexpr):
    return tl.multiple_of(tl.load(table + ENTRY).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _pre_activation(
    gates, bias, sums, place, units, product, inside, size, gate_pitch, GATE: tl.constexpr,
    FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    value = tl.load(gates + place + GATE * size, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + GATE * size + units, mask=inside, other=0.0).to(tl.float32)
    if GATE >= FIRST_RECURRENT and GATE < FIRST_RECURRENT + RECURRENT:
        at = product + (GATE - FIRST_RECURRENT) * gate_pitch + units
        # Up to the padding, which is zero: its length lets the compiler read 16 bytes at a time.
        value += tl.load(sums + at, mask=units < gate_pitch, other=0.0)
    return value


@triton.jit
def _squared(row, size, CHUNK: tl.constexpr):
    """The squared length of a row."""
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, size, CHUNK):
        units = start + tl.arange(0, CHUNK)
        value = tl.load(row + units, mask=units < size, other=0.0).to(tl.float32)
        total += value * value
    return tl.sum(total, axis=0)


@triton.jit
def _filters(table, units, inside, size):
    """``|w|^2``, s, b and the bias of a block of units; beyond the layer's end numbers that do no harm."""
    filters = address(table, FILTERS, tl.float32) + units
    squares = tl.load(filters, mask=inside, other=1.0)
    scale = tl.load(filters + size, mask=inside, other=1.0)
    offset = tl.load(filters + 2 * size, mask=inside, other=0.0)
    bias = tl.load(filters + 3 * size, mask=inside, other=0.0)
    return squares, scale, offset, bias


@triton.jit
def forward_gates(
    table, sums, at, batch, units, product, inside, size, gate_pitch, N_GATES: tl.constexpr,
    FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, NARROW: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Fetch the pre-activations of the candidate, the forget, the input and the output gate, or the constant gates.

    With 0 for ``RECURRENT`` they lack ``U h_{t-1}``, and ``sums`` is not read.
    """
    gates, bias = address(table, GATES, NARROW), address(table, BIAS, NARROW)
    place = at * (N_GATES * size) + units
    candidate = _pre_activation(
        gates, bias, sums, place, units, product, inside, size, gate_pitch, 0, FIRST_RECURRENT, RECURRENT,
        HAS_BIAS and VALUE is None,
    )  # fmt: skip
    if FORGET >= 0:
        f = _pre_activation(
            gates, bias, sums, place, units, product, inside, size, gate_pitch, FORGET, FIRST_RECURRENT, RECURRENT,
            HAS_BIAS,
        )  # fmt: skip
    else:
        f = tl.load(address(table, SCALE_F, tl.float32) + units, mask=inside, other=0.0)
    i = candidate
    if INPUT >= 0:
        i = _pre_activation(
            gates, bias, sums, place, units, product, inside, size, gate_pitch, INPUT, FIRST_RECURRENT, RECURRENT,
            HAS_BIAS,
        )  # fmt: skip
    elif FORGET < 0:
        i = tl.zeros_like(candidate) + tl.load(address(table, SCALE_I, tl.float32), mask=batch > 0, other=0.0)
    o = candidate
    if OUTPUT >= 0:
        o = _pre_activation(
            gates, bias, sums, place, units, product, inside, size, gate_pitch, OUTPUT, FIRST_RECURRENT, RECURRENT,
            HAS_BIAS,
        )  # fmt: skip
    return candidate, f, i, o


@triton.jit
def advance_state(
    table, candidate, f, i, o, before, h_before, real, last, at, batch, units, inside, size,
    N_GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr, CLIP: tl.constexpr, MASK: tl.constexpr,
    NORM: tl.constexpr, EPSILON: tl.constexpr, NARROW: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store ``c_t``, ``h_t``, at ``last`` too, and the activated gates, from the whole pre-activations.

    A program has units of one row, as numbers ``at`` and ``real``, or of several, as columns. Layer normalisation and
    other kernels than the linear one take one row.
    """
    gates, memories = address(table, GATES, NARROW), address(table, MEMORIES, tl.float32)
    hiddens = address(table, HIDDENS, NARROW)
    place = at * (N_GATES * size) + units
    kept = candidate
    if VALUE is not None:
        squares = tl.zeros_like(candidate)
        if CHUNK > 0:
            of_inputs = tl.load(address(table, WINDOWS, tl.float32) + at)
            squares += of_inputs + _squared(hiddens + at * size, size, CHUNK)
        filter_squares, scale, offset, candidate_bias = _filters(table, units, inside, size)
        candidate = VALUE(candidate, filter_squares, squares, scale, offset) + candidate_bias
    if SQUASH_CANDIDATE:
        candidate = tanh(candidate)
    if VALUE is None:
        kept = candidate
    if FORGET >= 0:
        f = tl.sigmoid(f)
    if INPUT >= 0:
        i = tl.sigmoid(i)
    elif FORGET >= 0:
        i = 1 - f
    c = i * candidate + f * before
    if CLIP is not None:
        c = clamp(c, -CLIP, CLIP)
    if NORM:
        mean = tl.sum(tl.where(inside, c, 0.0), axis=0) / size
        centred = tl.where(inside, c - mean, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / size + EPSILON)
        moments = address(table, MOMENTS, tl.float32)
        gain = tl.load(address(table, GAIN, tl.float32) + units, mask=inside, other=0.0)
        shift = tl.load(address(table, SHIFT, tl.float32) + units, mask=inside, other=0.0)
        tl.store(moments + at * 2, mean)
        tl.store(moments + at * 2 + 1, inverse)
        c = centred * inverse * gain + shift
    if MASK:
        c = tl.where(real, c, before)
    h = c
    if SQUASH_OUTPUT:
        h = tanh(c)
    if OUTPUT >= 0:
        o = tl.sigmoid(o)
        h = h * o
    if MASK:
        h = tl.where(real, h, h_before)
    # h first: the next product waits for it.
    tl.store(last, h, mask=inside)
    tl.store(hiddens + (at + batch) * size + units, h, mask=inside)
    tl.store(memories + (at + batch) * size + units, c, mask=inside)
    tl.store(gates + place, kept, mask=inside)
    if FORGET >= 0:
        tl.store(gates + place + FORGET * size, f, mask=inside)
    if INPUT >= 0:
        tl.store(gates + place + INPUT * size, i, mask=inside)
    if OUTPUT >= 0:
        tl.store(gates + place + OUTPUT * size, o, mask=inside)


@triton.jit(do_not_specialize=["ahead"])
def forward(
    table, sums, fed, ahead, size, sums_pitch, fed_pitch, gate_pitch,
    N_GATES: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr,
    FORGET: tl.constexpr, OUTPUT: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr,
    CLIP: tl.constexpr, MASK: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, EPSILON: tl.constexpr,
    NARROW: tl.constexpr, BLOCK: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``c_t``, ``h_t`` and the activated gates of a step, from ``W X_t``, in place, and ``sums``, ``U h_{t-1}``.

    ``fed`` holds ``h_{t-1}`` before and ``h_t`` after. The pitches are the rows' lengths of ``sums`` and ``fed``, and
    the distance of recurrent gates in a row. With ``VALUE``, the candidate's kernel, the candidate's gate keeps
    ``w^T z``. A kernel that reads no ``|z|^2`` has a ``CHUNK`` of 0.
    """
    row = tl.program_id(0)
    batch = tl.load(table + BATCH)
    if row < batch:
        at = (tl.load(table + DONE) + ahead) * batch + row
        units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = units < size
        last = fed + row.to(tl.int64) * fed_pitch + units
        # All is fetched before the first store: a load behind a store waits for the stored value's own loads.
        candidate, f, i, o = forward_gates(
            table, sums, at, batch, units, row.to(tl.int64) * sums_pitch, inside, size, gate_pitch, N_GATES,
            FIRST_RECURRENT, RECURRENT, INPUT, FORGET, OUTPUT, HAS_BIAS, NARROW, VALUE,
        )  # fmt: skip
        before = tl.load(address(table, MEMORIES, tl.float32) + at * size + units, mask=inside, other=0.0)
        real, h_before = True, before
        if MASK:
            real = tl.load(address(table, KEEP, tl.uint8) + at) != 0
            h_before = tl.load(last, mask=inside, other=0.0).to(tl.float32)
        advance_state(
            table, candidate, f, i, o, before, h_before, real, last, at, batch, units, inside, size, N_GATES, INPUT,
            FORGET, OUTPUT, SQUASH_CANDIDATE, SQUASH_OUTPUT, CLIP, MASK, NORM, EPSILON, NARROW, VALUE, CHUNK,
        )  # fmt: skip


@triton.jit
def _stored(gates, place, size, inside, GATE: tl.constexpr):
    return tl.load(gates + place + GATE * size, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _into(grads, fed, place, product, units, size, gate_pitch, inside, grad, GATE: tl.constexpr,
          FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr):  # fmt: skip
    """Store a gate's gradient for the products over all steps, and for the step before."""
    tl.store(grads + place + GATE * size, grad, mask=inside)
    if GATE >= FIRST_RECURRENT and GATE < FIRST_RECURRENT + RECURRENT:
        tl.store(fed + product + (GATE - FIRST_RECURRENT) * gate_pitch + units, grad, mask=inside)


@triton.jit
def _total(totals, inside, pitch, TO: tl.constexpr):
    """Row ``TO`` of the sums over the steps, TOTALS in the table; 0 if there is none, below 0."""
    total = 0.0
    if TO >= 0:
        total = tl.load(totals + TO * pitch, mask=inside, other=0.0)
    return total


@triton.jit
def _keep(totals, total, inside, pitch, TO: tl.constexpr):
    if TO >= 0:
        tl.store(totals + TO * pitch, total, mask=inside)


@triton.jit
def fetch_saved(
    table, at, batch, units, inside, size, N_GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr,
    OUTPUT: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Fetch all that a step's gradients need: the gates, ``c_{t-1}``, ``c_t`` and the gradient of ``h_t`` itself."""
    gates = address(table, GATES, NARROW)
    memories = address(table, MEMORIES, tl.float32)
    place = at * (N_GATES * size) + units
    candidate = _stored(gates, place, size, inside, 0)
    if FORGET >= 0:
        f = _stored(gates, place, size, inside, FORGET)
    else:
        f = tl.load(address(table, SCALE_F, tl.float32) + units, mask=inside, other=0.0)
    i = candidate
    if INPUT >= 0:
        i = _stored(gates, place, size, inside, INPUT)
    elif FORGET < 0:
        i = tl.zeros_like(candidate) + tl.load(address(table, SCALE_I, tl.float32), mask=batch > 0, other=0.0)
    o = candidate
    if OUTPUT >= 0:
        o = _stored(gates, place, size, inside, OUTPUT)
    before = tl.load(memories + at * size + units, mask=inside, other=0.0)
    now = tl.load(memories + (at + batch) * size + units, mask=inside, other=0.0)
    to_output = candidate
    if HAS_GRAD_OUTPUT:
        grad_output = address(table, GRAD_OUTPUT, NARROW)
        to_output = tl.load(grad_output + at * size + units, mask=inside, other=0.0).to(tl.float32)
    return candidate, f, i, o, before, now, to_output


@triton.jit
def retreat(
    table, fed, carry, held, to_h, to_c, passing, candidate, f, i, o, before, now, to_output, real, t, at, own, product,
    batch, units, inside, size, gate_pitch,
    N_GATES: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr,
    FORGET: tl.constexpr, OUTPUT: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr,
    CLIP: tl.constexpr, MASK: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, NORM: tl.constexpr, NARROW: tl.constexpr,
    VALUE: tl.constexpr, SLOPES: tl.constexpr, PARTS: tl.constexpr, TO_BIAS: tl.constexpr,
    TO_FILTERS: tl.constexpr, TO_SCALE: tl.constexpr, TO_OFFSET: tl.constexpr, TO_SIGMA_I: tl.constexpr,
    TO_SIGMA_F: tl.constexpr,
):  # fmt: skip
    """Store a step's gradients: of the gates, of ``c_{t-1}`` at ``carry``, and of ``h_{t-1}`` at ``held``.

    ``to_h`` and ``to_c`` are the gradients of ``h_t`` and ``c_t`` by later steps, ``passing`` by padding. Rows: as in
    :func:`advance_state`.
    """
    grads = address(table, GRAD_GATES, NARROW)
    place = at * (N_GATES * size) + units
    if PARTS > 0:
        steps = tl.load(table + STEPS)
        shares = address(table, SHARES, tl.float32)
        parts = tl.num_programs(1)
        part = tl.arange(0, PARTS)
        later = part < tl.where(t + 1 < steps, parts, 0)
        to_squares = tl.sum(tl.load(shares + (at + batch) * parts + part, mask=later, other=0.0), axis=0)
        h = tl.load(address(table, HIDDENS, NARROW) + (at + batch) * size + units, mask=inside, other=0.0)
        to_h += tl.where(t + 1 < steps, 2 * to_squares * h.to(tl.float32), 0.0)
    if MASK:
        to_h += passing
        tl.store(held + own, tl.where(real, 0.0, to_h), mask=inside)
    if HAS_GRAD_OUTPUT:
        to_h += to_output
    if VALUE is not None:
        squares = tl.zeros_like(candidate)
        if PARTS > 0:
            squares += tl.load(address(table, WINDOWS, tl.float32) + at)
        filter_squares, scale, offset, candidate_bias = _filters(table, units, inside, size)
        by_dot, by_filters, by_windows, by_scale, by_offset = SLOPES(candidate, filter_squares, squares, scale, offset)
        candidate = VALUE(candidate, filter_squares, squares, scale, offset) + candidate_bias
        if SQUASH_CANDIDATE:
            candidate = tanh(candidate)
    if INPUT < 0 and FORGET >= 0:
        i = 1 - f
    q = now
    slope = tl.zeros_like(now) + 1
    if SQUASH_OUTPUT:
        q = tanh(now)
        slope = 1 - q * q
    if OUTPUT >= 0:
        to_o = tl.where(real, to_h * q * o * (1 - o), 0.0)
        _into(grads, fed, place, product, units, size, gate_pitch, inside, to_o, OUTPUT, FIRST_RECURRENT, RECURRENT)
        slope = slope * o
    to_raw = to_c + to_h * slope
    if CLIP is not None:
        # As torch.clamp: at the bound itself the gradient passes. Gates that were rounded cannot tell.
        beyond = tl.abs(now) >= CLIP
        if NARROW.is_fp32():
            beyond = beyond & (tl.abs(i * candidate + f * before) != CLIP)
        to_raw = tl.where(beyond, 0.0, to_raw)
    if NORM:
        moments = address(table, MOMENTS, tl.float32)
        mean = tl.load(moments + at * 2)
        inverse = tl.load(moments + at * 2 + 1)
        normal = tl.where(inside, (i * candidate + f * before - mean) * inverse, 0.0)
        to_gain = address(table, GRAD_GAIN, tl.float32) + own
        to_shift = address(table, GRAD_SHIFT, tl.float32) + own
        more_gain = tl.where(real, to_raw * normal, 0.0)
        more_shift = tl.where(real, to_raw, 0.0)
        tl.store(to_gain, tl.load(to_gain, mask=inside, other=0.0) + more_gain, mask=inside)
        tl.store(to_shift, tl.load(to_shift, mask=inside, other=0.0) + more_shift, mask=inside)
        weighted = to_raw * tl.load(address(table, GAIN, tl.float32) + units, mask=inside, other=0.0)
        shared = tl.sum(weighted, axis=0) / size
        along = tl.sum(weighted * normal, axis=0) / size
        to_raw = inverse * (weighted - shared - normal * along)
    if VALUE is not None:
        # Fetched at once: after the first store each would wait for the one before.
        totals = address(table, TOTALS, tl.float32) + own
        pitch = batch * size
        of_bias = _total(totals, inside, pitch, TO_BIAS)
        of_filters = _total(totals, inside, pitch, TO_FILTERS)
        of_scale = _total(totals, inside, pitch, TO_SCALE)
        of_offset = _total(totals, inside, pitch, TO_OFFSET)
        of_sigma_i = _total(totals, inside, pitch, TO_SIGMA_I)
        of_sigma_f = _total(totals, inside, pitch, TO_SIGMA_F)
    left = to_raw * f
    if MASK:
        left = tl.where(real, left, to_c)
        to_raw = tl.where(real, to_raw, 0.0)
    tl.store(carry + own, left, mask=inside)
    to_candidate = to_raw * i
    if SQUASH_CANDIDATE:
        to_candidate = to_candidate * (1 - candidate * candidate)
    if FORGET >= 0:
        reach = before
        if INPUT < 0:
            reach = before - candidate
        to_f = tl.where(real, to_raw * reach * f * (1 - f), 0.0)
        _into(grads, fed, place, product, units, size, gate_pitch, inside, to_f, FORGET, FIRST_RECURRENT, RECURRENT)
    if INPUT >= 0:
        to_i = tl.where(real, to_raw * candidate * i * (1 - i), 0.0)
        _into(grads, fed, place, product, units, size, gate_pitch, inside, to_i, INPUT, FIRST_RECURRENT, RECURRENT)
    to_candidate = tl.where(real, to_candidate, 0.0)
    if VALUE is not None:
        _keep(totals, of_bias + to_candidate, inside, pitch, TO_BIAS)
        _keep(totals, of_filters + tl.where(real, to_candidate * by_filters, 0.0), inside, pitch, TO_FILTERS)
        _keep(totals, of_scale + tl.where(real, to_candidate * by_scale, 0.0), inside, pitch, TO_SCALE)
        _keep(totals, of_offset + tl.where(real, to_candidate * by_offset, 0.0), inside, pitch, TO_OFFSET)
        _keep(totals, of_sigma_i + tl.where(real, to_raw * candidate, 0.0), inside, pitch, TO_SIGMA_I)
        _keep(totals, of_sigma_f + tl.where(real, to_raw * before, 0.0), inside, pitch, TO_SIGMA_F)
        if PARTS > 0:
            mine = tl.sum(tl.where(inside & real, to_candidate * by_windows, 0.0), axis=0)
            tl.store(shares + at * parts + tl.program_id(1), mine)
        to_candidate = tl.where(real, to_candidate * by_dot, 0.0)
    _into(grads, fed, place, product, units, size, gate_pitch, inside, to_candidate, 0, FIRST_RECURRENT, RECURRENT)


@triton.jit(do_not_specialize=["ahead"])
def backward(
    table, sums, fed, carry, held, ahead, size, sums_pitch, sums_piece, fed_pitch, gate_pitch,
    N_GATES: tl.constexpr, FIRST_RECURRENT: tl.constexpr, RECURRENT: tl.constexpr, INPUT: tl.constexpr,
    FORGET: tl.constexpr, OUTPUT: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr,
    PIECES: tl.constexpr, CLIP: tl.constexpr, MASK: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, NORM: tl.constexpr,
    NARROW: tl.constexpr, BLOCK: tl.constexpr, VALUE: tl.constexpr, SLOPES: tl.constexpr, PARTS: tl.constexpr,
    TO_BIAS: tl.constexpr, TO_FILTERS: tl.constexpr, TO_SCALE: tl.constexpr, TO_OFFSET: tl.constexpr,
    TO_SIGMA_I: tl.constexpr, TO_SIGMA_F: tl.constexpr,
):  # fmt: skip
    """The gates' gradients of a step, counted from the last, from ``sums``, the gradient of ``h_t`` by later steps.

    It is the sum of ``PIECES`` of them, ``sums_piece`` numbers apart. The other pitches are as in :func:`forward`.

    ``carry``, ``(rows, d)``, holds the gradient of ``c_t`` before and of ``c_{t-1}`` after. ``held`` is the gradient of
    ``h_t`` that passes by a padded step. ``fed`` gets the gradients of the recurrent gates, for the next product.

    With ``VALUE`` and ``SLOPES``, the candidate's kernel, the candidate's gradient is that of ``w^T z``, and the sums
    of others over the steps go to TOTALS. SHARES get each program's part of the gradient of ``|z_t|^2``, and the step
    before reads them; ``PARTS`` is at least the number of programs that share a row, and 0 without ``|z|^2``.
    """
    row = tl.program_id(0)
    batch = tl.load(table + BATCH)
    if row < batch:
        t = tl.load(table + STEPS) - 1 - tl.load(table + DONE) - ahead
        at = t * batch + row
        units = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = units < size
        own = row.to(tl.int64) * size + units
        given = sums + row.to(tl.int64) * sums_pitch + units
        padded = units < gate_pitch
        to_h = tl.load(given, mask=padded, other=0.0)
        for piece in tl.static_range(1, PIECES):
            to_h += tl.load(given + piece * sums_piece, mask=padded, other=0.0)
        to_c = tl.load(carry + own, mask=inside, other=0.0)
        candidate, f, i, o, before, now, to_output = fetch_saved(
            table, at, batch, units, inside, size, N_GATES, INPUT, FORGET, OUTPUT, HAS_GRAD_OUTPUT, NARROW
        )  # fmt: skip
        real, passing = True, to_c
        if MASK:
            real = tl.load(address(table, KEEP, tl.uint8) + at) != 0
            passing = tl.load(held + own, mask=inside, other=0.0)
        retreat(
            table, fed, carry, held, to_h, to_c, passing, candidate, f, i, o, before, now, to_output, real, t, at, own,
            row.to(tl.int64) * fed_pitch, batch, units, inside, size, gate_pitch, N_GATES, FIRST_RECURRENT, RECURRENT,
            INPUT, FORGET, OUTPUT, SQUASH_CANDIDATE, SQUASH_OUTPUT, CLIP, MASK, HAS_GRAD_OUTPUT, NORM, NARROW, VALUE,
            SLOPES, PARTS, TO_BIAS, TO_FILTERS, TO_SCALE, TO_OFFSET, TO_SIGMA_I, TO_SIGMA_F,
        )  # fmt: skip
