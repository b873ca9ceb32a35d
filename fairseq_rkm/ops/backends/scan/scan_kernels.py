"""Triton kernels of ``scan.py``: the memory's linear recurrence, in parallel over stretches of time.

A program has one row of the batch and ``BLOCK_D`` units. It takes the sequence in chunks of ``BLOCK_T`` steps and scans
each chunk in parallel: the pairs ``(f, u)`` of ``c_t = f_t c_{t-1} + u_t`` compose to ``(f_1 f_2, f_2 u_1 + u_2)``.
Without logarithm and division, gates at 0 and 1 do no harm.

A clipped memory is no linear recurrence, but parallel in time all the same. With ``0 <= f_t <= 1`` a step is a map
``x -> clamp(f x + u, low, high)`` that never falls, and two of its kind compose to a third. Going back, a step that
clipped passes no gradient on: the recurrence of the gradients stays linear.

Layer normalisation makes the recurrence nonlinear. The ``normed`` kernels go step by step. A program has one row and
all its units, and fetches a step's gates while it computes the step before.
"""

import triton
import triton.language as tl

from fairseq_rkm.ops.triton_functions import clamp, tanh


@triton.jit
def _compose(f_left, u_left, f_right, u_right):
    return f_left * f_right, f_right * u_left + u_right


@triton.jit
def _compose_clipped(f_left, u_left, low_left, high_left, f_right, u_right, low_right, high_right):
    low = clamp(f_right * low_left + u_right, low_right, high_right)
    high = clamp(f_right * high_left + u_right, low_right, high_right)
    return f_left * f_right, f_right * u_left + u_right, low, high


@triton.jit
def _scan_clipped(f, u, carry, real, bound, FINITE: tl.constexpr):
    """A chunk's clipped ``c_t`` from ``c`` before it, ``carry``; a step that is not real keeps it."""
    # No memory within the chunk is larger than ``reach``. It stands for infinity, times which a gate of 0 is NaN.
    reach = tl.where(tl.abs(carry) > bound, tl.abs(carry), bound)
    reach = tl.where(reach < FINITE, reach, FINITE)[None, :]
    limit = tl.where(real, bound[None, :], reach)
    # A sum beyond this is clipped whatever the memory is.
    u = clamp(u, -limit - reach, limit + reach)
    product, c, low, high = tl.associative_scan((f, u, -limit, limit), 0, _compose_clipped)
    return clamp(c + product * carry[None, :], low, high)


@triton.jit
def _gate(gates, place, mask, PLACE: tl.constexpr, size, WIDE: tl.constexpr):
    """Gate number ``PLACE`` of a tile, through a sigmoid."""
    return tl.sigmoid(tl.load(gates + place + PLACE * size, mask=mask, other=0.0).to(WIDE))


@triton.jit
def _activate(
    gates, place, mask, s_i, s_f, size,
    INPUT: tl.constexpr, FORGET: tl.constexpr, SQUASH_CANDIDATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Candidate, input scale and forget scale of a tile."""
    candidate = tl.load(gates + place, mask=mask, other=0.0).to(WIDE)
    if SQUASH_CANDIDATE:
        candidate = tanh(candidate)
    f = tl.zeros_like(candidate) + s_f
    if FORGET >= 0:
        f = _gate(gates, place, mask, FORGET, size, WIDE)
    if INPUT >= 0:
        i = _gate(gates, place, mask, INPUT, size, WIDE)
    elif FORGET >= 0:
        i = 1 - f
    else:
        i = tl.zeros_like(candidate) + s_i
    return candidate, i, f


@triton.jit
def forward(
    gates, first_memory, memory, output, last_output, last_memory, keep, scale_i, scale_f, steps, batch, size,
    GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr, HAS_MEMORY: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, CLIP: tl.constexpr, FINITE: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """All ``c_t``, ``(T + 1, B, d)``, and ``h_t`` from ``W X + b``, ``(T, B, GATES * d)``, and ``c_0``.

    Without a mask the kernel also writes the last step's, ``(B, d)``.
    """
    row = tl.program_id(0)
    units = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = units < size
    carry = tl.zeros((BLOCK_D,), dtype=WIDE)
    if CLIP is not None:
        bound = tl.full((BLOCK_D,), CLIP, dtype=WIDE)
    if HAS_FIRST:
        carry = tl.load(first_memory + row * size + units, mask=inside, other=0.0)
    tl.store(memory + row * size + units, carry, mask=inside)
    s_i = tl.load(scale_i) if INPUT < 0 and FORGET < 0 else 0.0
    s_f = tl.load(scale_f + units, mask=inside, other=0.0)[None, :] if HAS_MEMORY and FORGET < 0 else 0.0
    for start in range(0, steps, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < steps)[:, None] & inside[None, :]
        at = (t.to(tl.int64) * batch + row)[:, None]
        place = at * (GATES * size) + units[None, :]
        candidate, i, f = _activate(gates, place, mask, s_i, s_f, size, INPUT, FORGET, SQUASH_CANDIDATE, WIDE)
        u = i * candidate
        real = mask
        if MASK:
            real = mask & (tl.load(keep + at, mask=(t < steps)[:, None], other=0) != 0)
        if HAS_MEMORY:
            f = tl.where(real, f, 1.0)
            u = tl.where(real, u, 0.0)
            if CLIP is None:
                product, c = tl.associative_scan((f, u), 0, _compose)
                c += product * carry[None, :]
            else:
                c = _scan_clipped(f, u, carry, real, bound, FINITE)
            # Steps past the end carry the memory on: the last one holds it.
            carry = tl.sum(tl.where((tl.arange(0, BLOCK_T) == BLOCK_T - 1)[:, None], c, 0.0), axis=0)
        elif CLIP is None:
            c = u
        else:
            c = clamp(u, -bound[None, :], bound[None, :])
        tl.store(memory + (at + batch) * size + units[None, :], c, mask=mask)
        h = c
        if SQUASH_OUTPUT:
            h = tanh(c)
        if OUTPUT >= 0:
            h = h * _gate(gates, place, mask, OUTPUT, size, WIDE)
        tl.store(output + at * size + units[None, :], tl.where(real, h, 0.0), mask=mask)
        if not MASK:
            last = row * size + units[None, :] + (t * 0)[:, None]
            tl.store(last_output + last, h, mask=mask & (t == steps - 1)[:, None])
            tl.store(last_memory + last, c, mask=mask & (t == steps - 1)[:, None])


@triton.jit
def backward(
    gates, memory, grad_output, last_grad_hidden, last_grad_memory, last, grad_gates, first_grad_memory, keep,
    scale_i, scale_f, steps, batch, size,
    GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr, HAS_MEMORY: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, CLIP: tl.constexpr, HAS_LAST_HIDDEN: tl.constexpr,
    HAS_LAST_MEMORY: tl.constexpr,
):  # fmt: skip
    """The gradients of the pre-activations and of ``c_0`` from the gradients of all ``h_t`` and the final state.

    The gradient e_t of ``c_t`` obeys ``e_t = s_t + f_{t+1} e_{t+1}``, with the part s_t through ``h_t``. It is the same
    scan, backward in time. With a mask, ``last`` numbers each row's last real step, from 0; its state is the final one.
    """
    row = tl.program_id(0)
    units = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = units < size
    s_i = tl.load(scale_i) if INPUT < 0 and FORGET < 0 else 0.0
    s_f = tl.load(scale_f + units, mask=inside, other=0.0)[None, :] if HAS_MEMORY and FORGET < 0 else 0.0
    final = tl.load(last + row) if MASK else steps - 1
    carry = tl.zeros((BLOCK_D,), dtype=WIDE)
    to_last_h = carry[None, :]
    to_last_c = to_last_h
    if HAS_LAST_HIDDEN:
        to_last_h = tl.load(last_grad_hidden + row * size + units, mask=inside, other=0.0).to(WIDE)[None, :]
    if HAS_LAST_MEMORY:
        to_last_c = tl.load(last_grad_memory + row * size + units, mask=inside, other=0.0)[None, :]
    first_f = carry
    chunks = tl.cdiv(steps, BLOCK_T)
    for done in range(0, chunks):
        t = (chunks - 1 - done) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (t < steps)[:, None] & inside[None, :]
        at = (t.to(tl.int64) * batch + row)[:, None]
        place = at * (GATES * size) + units[None, :]
        candidate, i, f = _activate(gates, place, mask, s_i, s_f, size, INPUT, FORGET, SQUASH_CANDIDATE, WIDE)
        real = mask
        if MASK:
            real = mask & (tl.load(keep + at, mask=(t < steps)[:, None], other=0) != 0)
        c = tl.load(memory + (at + batch) * size + units[None, :], mask=mask, other=0.0)
        is_last = (t == final)[:, None]
        to_h = tl.load(grad_output + at * size + units[None, :], mask=real, other=0.0).to(WIDE)
        to_h += tl.where(is_last, to_last_h, 0.0)
        q = c
        slope = tl.zeros_like(c) + 1
        if SQUASH_OUTPUT:
            q = tanh(c)
            slope = 1 - q * q
        to_c = to_h * slope
        if OUTPUT >= 0:
            o = _gate(gates, place, mask, OUTPUT, size, WIDE)
            to_c = to_c * o
            tl.store(grad_gates + place + OUTPUT * size, tl.where(real, to_h * q * o * (1 - o), 0.0), mask=mask)
        to_c = tl.where(real, to_c + tl.where(is_last, to_last_c, 0.0), 0.0)
        if CLIP is not None:
            raw = i * candidate
            if HAS_MEMORY:
                raw += f * tl.load(memory + at * size + units[None, :], mask=mask, other=0.0)
            # At the bound itself the gradient passes, as through ``torch.clamp``.
            passes = (tl.abs(raw) <= tl.full((BLOCK_D,), CLIP, dtype=WIDE)[None, :]) | (real == 0)
            to_c = tl.where(passes, to_c, 0.0)
        if HAS_MEMORY:
            following = (t + 1 < steps)[:, None] & inside[None, :]
            if FORGET >= 0:
                next_f = _gate(gates, place + (batch * GATES) * size, following, FORGET, size, WIDE)
            else:
                next_f = tl.zeros_like(c) + s_f
            if MASK:
                following &= tl.load(keep + at + batch, mask=(t + 1 < steps)[:, None], other=0) != 0
            next_f = tl.where(following, next_f, 1.0)
            if CLIP is not None:
                next_f = tl.where(passes, next_f, 0.0)
            product, to_c = tl.associative_scan((next_f, to_c), 0, _compose, reverse=True)
            to_c += product * carry[None, :]
            is_first = (tl.arange(0, BLOCK_T) == 0)[:, None]
            carry = tl.sum(tl.where(is_first, to_c, 0.0), axis=0)
            first_f = tl.sum(tl.where(is_first, tl.where(real, f, 1.0), 0.0), axis=0)
            if FORGET >= 0:
                before = tl.load(memory + at * size + units[None, :], mask=mask, other=0.0)
                if INPUT < 0:
                    before -= candidate
                tl.store(
                    grad_gates + place + FORGET * size, tl.where(real, to_c * before * f * (1 - f), 0.0), mask=mask
                )
        if INPUT >= 0:
            tl.store(grad_gates + place + INPUT * size, tl.where(real, to_c * candidate * i * (1 - i), 0.0), mask=mask)
        to_candidate = to_c * i
        if SQUASH_CANDIDATE:
            to_candidate = to_candidate * (1 - candidate * candidate)
        tl.store(grad_gates + place, tl.where(real, to_candidate, 0.0), mask=mask)
    tl.store(first_grad_memory + row * size + units, carry * first_f, mask=inside)


@triton.jit
def _gates_of_step(
    gates, t, steps, batch, row, size, units, inside, s_i, s_f,
    GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Candidate, input scale, forget scale and output scale of step t; outside the sequence nothing is loaded."""
    step = tl.zeros_like(units) + t
    mask = inside & (step >= 0) & (step < steps)
    place = (t.to(tl.int64) * batch + row) * (GATES * size) + units
    candidate, i, f = _activate(gates, place, mask, s_i, s_f, size, INPUT, FORGET, SQUASH_CANDIDATE, WIDE)
    o = tl.zeros_like(candidate) + 1
    if OUTPUT >= 0:
        o = _gate(gates, place, mask, OUTPUT, size, WIDE)
    return candidate, i, f, o


@triton.jit
def normed_forward(
    gates, first_memory, memory, output, last_output, last_memory, moments, gain, shift, keep, scale_i, scale_f, steps,
    batch, size,
    GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_FIRST: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """As :func:`forward`, with layer normalisation; ``moments``, ``(T, B, 2)``: means and reciprocal deviations."""
    row = tl.program_id(0)
    units = tl.arange(0, BLOCK_D)
    inside = units < size
    c = tl.zeros((BLOCK_D,), dtype=WIDE)
    if HAS_FIRST:
        c = tl.load(first_memory + row * size + units, mask=inside, other=0.0)
    tl.store(memory + row * size + units, c, mask=inside)
    s_i = tl.load(scale_i) if INPUT < 0 and FORGET < 0 else 0.0
    s_f = tl.load(scale_f + units, mask=inside, other=0.0) if FORGET < 0 else 0.0
    g = tl.load(gain + units, mask=inside, other=0.0)
    b = tl.load(shift + units, mask=inside, other=0.0)
    start = row * 0
    h = c
    candidate, i, f, o = _gates_of_step(
        gates, start, steps, batch, row, size, units, inside, s_i, s_f,
        GATES, INPUT, FORGET, OUTPUT, SQUASH_CANDIDATE, WIDE,
    )  # fmt: skip
    for done in range(0, steps):
        t = start + done
        next_candidate, next_i, next_f, next_o = _gates_of_step(
            gates, t + 1, steps, batch, row, size, units, inside, s_i, s_f,
            GATES, INPUT, FORGET, OUTPUT, SQUASH_CANDIDATE, WIDE,
        )  # fmt: skip
        at = t.to(tl.int64) * batch + row
        raw = i * candidate + f * c
        mean = tl.sum(tl.where(inside, raw, 0.0), axis=0) / size
        deviation = tl.where(inside, raw - mean, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(deviation * deviation, axis=0) / size + EPSILON)
        tl.store(moments + at * 2, mean)
        tl.store(moments + at * 2 + 1, inverse)
        new = deviation * inverse * g + b
        h = new
        if SQUASH_OUTPUT:
            h = tanh(new)
        h = h * o
        if MASK:
            real = tl.load(keep + at) != 0
            new = tl.where(real, new, c)
            h = tl.where(real, h, 0.0)
        c = new
        tl.store(memory + (at + batch) * size + units, c, mask=inside)
        tl.store(output + at * size + units, h, mask=inside)
        candidate, i, f, o = next_candidate, next_i, next_f, next_o
    if not MASK:
        tl.store(last_output + row * size + units, h, mask=inside)
        tl.store(last_memory + row * size + units, c, mask=inside)


@triton.jit
def normed_backward(
    gates, memory, grad_output, last_grad_hidden, last_grad_memory, last, grad_gates, first_grad_memory, grad_gain,
    grad_shift, moments, gain, keep, scale_i, scale_f, steps, batch, size,
    GATES: tl.constexpr, INPUT: tl.constexpr, FORGET: tl.constexpr, OUTPUT: tl.constexpr,
    SQUASH_CANDIDATE: tl.constexpr, SQUASH_OUTPUT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_LAST_HIDDEN: tl.constexpr, HAS_LAST_MEMORY: tl.constexpr,
):  # fmt: skip
    """As :func:`backward`, with layer normalisation; ``grad_gain`` and ``grad_shift``, ``(B, d)``: each row's share."""
    row = tl.program_id(0)
    units = tl.arange(0, BLOCK_D)
    inside = units < size
    s_i = tl.load(scale_i) if INPUT < 0 and FORGET < 0 else 0.0
    s_f = tl.load(scale_f + units, mask=inside, other=0.0) if FORGET < 0 else 0.0
    g = tl.load(gain + units, mask=inside, other=0.0)
    final = tl.load(last + row) if MASK else steps - 1
    zeros = tl.zeros((BLOCK_D,), dtype=WIDE)
    carry, to_gain, to_shift, to_last_h, to_last_c = zeros, zeros, zeros, zeros, zeros
    if HAS_LAST_HIDDEN:
        to_last_h = tl.load(last_grad_hidden + row * size + units, mask=inside, other=0.0).to(WIDE)
    if HAS_LAST_MEMORY:
        to_last_c = tl.load(last_grad_memory + row * size + units, mask=inside, other=0.0)
    start = row * 0 + steps - 1
    candidate, i, f, o = _gates_of_step(
        gates, start, steps, batch, row, size, units, inside, s_i, s_f,
        GATES, INPUT, FORGET, OUTPUT, SQUASH_CANDIDATE, WIDE,
    )  # fmt: skip
    now = tl.load(memory + ((start + 1).to(tl.int64) * batch + row) * size + units, mask=inside, other=0.0)
    for done in range(0, steps):
        t = start - done
        next_candidate, next_i, next_f, next_o = _gates_of_step(
            gates, t - 1, steps, batch, row, size, units, inside, s_i, s_f,
            GATES, INPUT, FORGET, OUTPUT, SQUASH_CANDIDATE, WIDE,
        )  # fmt: skip
        at = t.to(tl.int64) * batch + row
        place = at * (GATES * size) + units
        before = tl.load(memory + at * size + units, mask=inside, other=0.0)
        mean = tl.load(moments + at * 2)
        inverse = tl.load(moments + at * 2 + 1)
        to_h = tl.load(grad_output + at * size + units, mask=inside, other=0.0).to(WIDE)
        to_h += tl.where(t == final, to_last_h, 0.0)
        q = now
        slope = zeros + 1
        if SQUASH_OUTPUT:
            q = tanh(now)
            slope = 1 - q * q
        to_c = carry + to_h * o * slope + tl.where(t == final, to_last_c, 0.0)
        normal = tl.where(inside, (i * candidate + f * before - mean) * inverse, 0.0)
        weighted = to_c * g
        shared = tl.sum(weighted, axis=0) / size
        along = tl.sum(weighted * normal, axis=0) / size
        to_raw = tl.where(inside, inverse * (weighted - shared - normal * along), 0.0)
        to_o = to_h * q * o * (1 - o)
        more_gain = to_c * normal
        more_shift = to_c
        left = to_raw * f
        if MASK:
            real = tl.load(keep + at) != 0
            left = tl.where(real, left, carry)
            to_raw = tl.where(real, to_raw, 0.0)
            to_o = tl.where(real, to_o, 0.0)
            more_gain = tl.where(real, more_gain, 0.0)
            more_shift = tl.where(real, more_shift, 0.0)
        to_gain += more_gain
        to_shift += more_shift
        carry = left
        if OUTPUT >= 0:
            tl.store(grad_gates + place + OUTPUT * size, to_o, mask=inside)
        if FORGET >= 0:
            reach = before
            if INPUT < 0:
                reach = before - candidate
            tl.store(grad_gates + place + FORGET * size, to_raw * reach * f * (1 - f), mask=inside)
        if INPUT >= 0:
            tl.store(grad_gates + place + INPUT * size, to_raw * candidate * i * (1 - i), mask=inside)
        to_candidate = to_raw * i
        if SQUASH_CANDIDATE:
            to_candidate = to_candidate * (1 - candidate * candidate)
        tl.store(grad_gates + place, to_candidate, mask=inside)
        now = before
        candidate, i, f, o = next_candidate, next_i, next_f, next_o
    tl.store(first_grad_memory + row * size + units, carry, mask=inside)
    tl.store(grad_gain + row * size + units, to_gain, mask=inside)
    tl.store(grad_shift + row * size + units, to_shift, mask=inside)
