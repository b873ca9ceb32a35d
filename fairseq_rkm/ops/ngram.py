"""n-gram inputs ``X_t = [x_t; x_{t-1}; ...; x_{t-n+1}]`` and their projection, without the n-fold input in memory.

Every backend takes *extended* inputs of shape ``(T + n - 1, B, m)``. The window of step t is
``[inputs[t + n - 1], ..., inputs[t]]``, newest first. This file alone handles earlier inputs, centred windows and the
direction of travel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops.alignment import align


def extend(x: Tensor, ngram: int, padding: str, context: Tensor | None) -> Tensor:
    """Extend the inputs, so that every window finds its n inputs: before them, and for ``"same"`` also behind.

    Args:
        x: ``(T, B, m)``, zero at padding, in the direction of travel.
        ngram: n.
        padding: ``"causal"`` ends a window at its step; ``"same"`` centres it there.
        context: ``(n - 1, B, m)``, the inputs before the first, oldest first; None for zeros.

    Returns:
        ``(T + n - 1, B, m)``.
    """
    if ngram == 1:
        return x
    if context is None:
        context = x.new_zeros(ngram - 1, *x.shape[1:])
    if padding == "causal":
        return torch.cat([context, x])
    ahead = steps_ahead(ngram, padding)
    return torch.cat([context[ahead:], x, x.new_zeros(ahead, *x.shape[1:])])


def extend_against_time(x: Tensor, ngram: int, padding: str) -> Tensor:
    """As :func:`extend` for the direction against time, in the order of time: its flip is what ``extend`` gives.

    Args:
        x: ``(T, B, m)``, zero at padding, in the order of time.
        ngram: n.
        padding: as in :func:`extend`.
    """
    ahead = steps_ahead(ngram, padding)
    return F.pad(x, (0, 0, 0, 0, ahead, ngram - 1 - ahead))


def steps_ahead(ngram: int, padding: str) -> int:
    """The number of inputs after its step that a window holds; of an even window the larger half."""
    return ngram // 2 if padding == "same" else 0


def is_empty(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a problem has no step or no sequence.

    The n - 1 inputs before the first step are no steps.

    Args:
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        weight: ``(G, n m)``.
    """
    return not inputs.numel() or inputs.size(0) < weight.size(1) // inputs.size(2)


def windows(inputs: Tensor, ngram: int, ahead: int = 0, reset: Tensor | None = None) -> Tensor:
    """All windows, written out; none reaches across a reset. They are inputs of a recurrence with n = 1.

    Args:
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        ngram: n.
        ahead: the inputs after its step that a window holds.
        reset: ``(T, B)`` bool, True where the sequence begins anew before the step; None is False everywhere.

    Returns:
        ``(T, B, n * m)``, newest input first; zero on the other side of a reset.
    """
    if ngram == 1:
        return inputs
    steps = inputs.size(0) - ngram + 1
    taps = [inputs[start : start + steps] for start in range(ngram - 1, -1, -1)]
    if reset is not None:
        number = reset.long().cumsum(0)  # ONNX sums no truth values
        none = number.new_zeros(ngram - 1, number.size(1))
        numbers = torch.cat([none[ahead:], number, none[:ahead]])
        near = [numbers[start : start + steps] for start in range(ngram - 1, -1, -1)]
        taps = [t.masked_fill((other != number).unsqueeze(-1), 0) for t, other in zip(taps, near, strict=True)]
    return torch.cat(taps, dim=2)


def next_context(
    x: Tensor, ngram: int, context: Tensor | None, keep: Tensor | None, reset: Tensor | None = None
) -> Tensor:
    """The last ``n - 1`` inputs up to each row's last real step; the next segment's windows reach back to them.

    Args:
        x: ``(T, B, m)``, zero at padding.
        ngram: n, at least 2.
        context: as in :func:`extend`.
        keep: ``(T, B)`` bool, True at real steps; None if all steps are real.
        reset: ``(T, B)`` bool; inputs before a row's last True count as zero. None is False everywhere.

    Returns:
        ``(n - 1, B, m)``, oldest first.
    """
    extended = extend(x, ngram, "causal", context)
    if keep is None:
        last = extended[x.size(0) :].clone()
        if reset is not None:
            lengths = torch.ones_like(reset, dtype=torch.int64).sum(0)  # a trace would take torch.full's for a constant
    else:
        lengths = last_real_step(keep)
        index = lengths + torch.arange(ngram - 1, device=x.device).unsqueeze(1)
        last = extended.gather(0, index.unsqueeze(-1).expand(-1, -1, x.size(2)))
    if reset is None:
        return last
    begun = last_real_step(reset)  # counted from 1; 0 without a reset
    number = lengths + torch.arange(2 - ngram, 1, device=x.device).unsqueeze(1)
    return last.masked_fill(((number < begun) & (begun > 0)).unsqueeze(-1), 0)


def last_real_step(keep: Tensor) -> Tensor:
    """The number of each row's last real step, counted from 1; 0 for a row without any.

    Args:
        keep: ``(T, B)`` bool.

    Returns:
        ``(B,)`` int64.
    """
    numbers = torch.arange(1, keep.size(0) + 1, device=keep.device).unsqueeze(1)
    return torch.cat([numbers.new_zeros(1, keep.size(1)), numbers * keep]).amax(0)


def project(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None, against_time: bool = False
) -> Tensor:
    """``W X_t + b`` for all steps: one matrix product over time for each of the n inputs of a window.

    Args:
        inputs: extended inputs, ``(T + n - 1, B, m)``.
        weight: ``(G, n * m)``.
        bias: ``(G,)`` or None.
        out: a tensor for the result, ``(T * B, G)``, with contiguous rows; None makes one.
        against_time: whether the newest input of a window is its earliest, ``inputs[t]``.

    Returns:
        ``(T, B, G)``, contiguous if ``out`` is.
    """
    if inputs.is_cuda:  # on a CPU only the result needs alignment
        inputs, weight = align(inputs, weight)
    if out is None and weight.size(1) == inputs.size(2):
        return F.linear(inputs, weight, bias)
    (newest, taps), *older = _taps(inputs, weight, against_time)
    result = torch.mm(newest, taps.t(), out=out) if bias is None else torch.addmm(bias, newest, taps.t(), out=out)
    for window, taps in older:
        result.addmm_(window, taps.t())
    ngram = weight.size(1) // inputs.size(2)
    return result.view(inputs.size(0) - ngram + 1, inputs.size(1), weight.size(0))


def project_backward(
    grad: Tensor, inputs: Tensor, weight: Tensor, need_inputs: bool, need_weight: bool, against_time: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`project` with respect to its inputs and its weight.

    Args:
        grad: ``(T, B, G)`` or ``(T * B, G)``, with contiguous rows.
        inputs: as in :func:`project`.
        weight: as in :func:`project`.
        need_inputs: whether to compute the first result.
        need_weight: whether to compute the second result.
        against_time: as in :func:`project`.

    Returns:
        The gradients of inputs and weight, of their shapes; None for one that is not needed.
    """
    flat, size = grad.view(-1, grad.size(-1)), inputs.size(2)
    if weight.size(1) == size:
        grad_inputs = torch.mm(flat, weight).view(inputs.shape) if need_inputs else None
        return grad_inputs, torch.mm(flat.t(), inputs.view(-1, size)) if need_weight else None
    grad_inputs = torch.zeros_like(inputs) if need_inputs else None
    if grad_inputs is not None:
        add_input_gradients(grad, weight, grad_inputs, against_time)
    grad_weight = None
    if need_weight:
        grad_weight = torch.cat([flat.t() @ window for window, _ in _taps(inputs, weight, against_time)], dim=1)
    return grad_inputs, grad_weight


def add_input_gradients(grad: Tensor, weight: Tensor, into: Tensor, against_time: bool = False) -> None:
    """Add the gradients of :func:`project` with respect to its inputs, of a stretch of time; for n = 1, set them.

    Args:
        grad: ``(T, B, G)`` or ``(T * B, G)``, with contiguous rows.
        weight: as in :func:`project`.
        into: the gradients of the stretch's extended inputs, ``(T + n - 1, B, m)``, contiguous.
        against_time: as in :func:`project`.
    """
    flat = grad.view(-1, grad.size(-1))
    if into.size(2) == weight.size(1):
        torch.mm(flat, weight, out=into.flatten(0, 1))
        return
    for window, taps in _taps(into, weight, against_time):
        window.addmm_(flat, taps)


def _taps(inputs: Tensor, weight: Tensor, against_time: bool) -> list[tuple[Tensor, Tensor]]:
    """For each k the k-th newest inputs of all windows, ``(T * B, m)``, and their columns of the weight, ``(G, m)``."""
    length, batch, size = inputs.shape
    if weight.size(1) == size:
        return [(inputs.view(length * batch, size), weight)]
    ngram = weight.size(1) // size
    steps = length - ngram + 1
    starts = range(ngram) if against_time else range(ngram - 1, -1, -1)
    windows = [inputs[start : start + steps].view(steps * batch, size) for start in starts]
    return list(zip(windows, weight.split(size, dim=1), strict=True))
