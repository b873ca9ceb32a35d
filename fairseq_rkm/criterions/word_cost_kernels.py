"""Triton kernels of ``word_costs.py``: a program has one row of logits, and takes it in blocks of columns.

All numbers are float32 within a kernel. A row that is read twice comes from a cache the second time.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(start, width, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return columns, columns < width


@triton.jit
def forward(
    logits, words, costs, sums, probabilities, width, ignored, PREDICT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of ``(N, V)`` logits: the logarithm of each row's sum of exponentials, its word's cost, and probabilities."""
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * width
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        columns, inside = _columns(start, width, BLOCK)
        scores = tl.load(own + columns, mask=inside, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(scores, 0))
        # Without a finite score so far nothing is to be subtracted: -inf - -inf is no number.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(scores - shift), 0)
    sum_ = largest + tl.log(total)
    tl.store(sums + row, sum_)
    word = tl.load(words + row)
    # A word outside the vocabulary has no cost that is a number.
    known = (word >= 0) & (word < width)
    score = tl.load(own + word, mask=known, other=float("nan")).to(tl.float32)
    tl.store(costs + row, tl.where(word == ignored, 0.0, sum_ - score))
    if PREDICT:
        predicted = probabilities + row.to(tl.int64) * width
        for start in range(0, width, BLOCK):
            columns, inside = _columns(start, width, BLOCK)
            scores = tl.load(own + columns, mask=inside, other=float("-inf")).to(tl.float32)
            tl.store(predicted + columns, tl.exp(scores - sum_), mask=inside)


@triton.jit
def backward(
    logits, words, sums, grad_costs, grad_probabilities, grad_logits, width, ignored,
    COSTS: tl.constexpr, PREDICT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of logits, ``(N, V)``, from those of costs and probabilities, where there are any."""
    row = tl.program_id(0)
    offset = row.to(tl.int64) * width
    word = tl.load(words + row)
    sum_ = tl.load(sums + row)
    to_cost = tl.zeros((), tl.float32)
    if COSTS:
        to_cost = tl.where(word == ignored, 0.0, tl.load(grad_costs + row).to(tl.float32))
    mean = tl.zeros((), tl.float32)
    if PREDICT:
        for start in range(0, width, BLOCK):
            columns, inside = _columns(start, width, BLOCK)
            scores = tl.load(logits + offset + columns, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.load(grad_probabilities + offset + columns, mask=inside, other=0.0).to(tl.float32)
            mean += tl.sum(tl.exp(scores - sum_) * slope, 0)
    for start in range(0, width, BLOCK):
        columns, inside = _columns(start, width, BLOCK)
        scores = tl.load(logits + offset + columns, mask=inside, other=float("-inf")).to(tl.float32)
        slope = to_cost - mean
        if PREDICT:
            slope += tl.load(grad_probabilities + offset + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.exp(scores - sum_) * slope - tl.where(columns == word, to_cost, 0.0)
        tl.store(grad_logits + offset + columns, grad, mask=inside)
