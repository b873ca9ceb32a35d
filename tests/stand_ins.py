"""Stands in for a GPU in tests of layers side by side and two directions at once: no streams, ``batched``'s loops."""

import random
from dataclasses import replace
from functools import partial

import torch

from fairseq_rkm.ops import dispatch, two_directions, wavefront, wavefront_plan
from fairseq_rkm.ops.backends import batched
from fairseq_rkm.ops.passes import Directions
from fairseq_rkm.ops.stretches import Stretches
from fairseq_rkm.ops.wavefront_plan import Plan


class AnyOrder:
    """Lanes whose work runs at the end of the ``with``, in any order that keeps each lane's and the marks'."""

    generator = random.Random(0)

    def __init__(self, device, count):
        self.count, self.work, self.handed_over = count, [], []

    def __enter__(self):
        return self

    def run(self, lane, work, *after):
        assert 0 <= lane < self.count
        self.work.append((lane, work, after))
        return len(self.work) - 1

    def hand_over(self, tensors):
        """Only the last thing that happens within; the tensors are there afterwards."""

    def __exit__(self, kind, *failure):
        done = set()
        while kind is None and len(done) < len(self.work):
            ready = {}
            for number, (lane, _, after) in enumerate(self.work):
                if number not in done and lane not in ready:
                    ready[lane] = number if done.issuperset(after) else None
            number = self.generator.choice([number for number in ready.values() if number is not None])
            self.work[number][1]()
            done.add(number)


def forward(cell, weights, keep, gates, first, last, hiddens, memories, rows):
    wide = gates.to(memories.dtype, copy=True)
    if weights.bias is not None:
        wide += weights.bias
    run = batched._Forward(cell, weights, wide, hiddens.dtype, keep)
    run.hidden, run.memory = hiddens, memories
    run.start(*first)
    run.loop()
    gates.copy_(wide)
    for to, states in zip(last, (hiddens, memories), strict=True):
        to.copy_(states[-1])


def backward(cell, weights, keep, gates, memories, grad_output, last, first, grad_gates, rows):
    run = batched._Backward(cell, weights, gates.to(memories.dtype), memories, memories, keep, None)
    given = zip((grad_output, *last), (memories[1:], memories[0], memories[0]), strict=True)
    grads = run.loop(*(torch.zeros_like(like) if grad is None else grad for grad, like in given))
    for to, grad in zip(first, grads, strict=True):
        to.copy_(grad)
    grad_gates.copy_(run.factors)


STRETCHES = Stretches(forward, backward, lambda *_: [], lambda *_: True)


def run_side_by_side(patch, chunks, lanes=2):
    """Have all stacks that can run side by side on a CPU; ``patch``: pytest's."""
    patch.setattr(wavefront, "Lanes", AnyOrder)
    patch.setattr(wavefront_plan, "plan_for", partial(_plan, chunks, lanes))


def _plan(chunks, lanes, backend, cell, x, layers, size, mask, wanted, recorded=None):
    if backend == "reference" or not cell.has_feedback or not x.numel():
        return None
    return Plan(wanted or chunks, None, min(lanes, layers), STRETCHES)


WAYS = (lambda x: x), (lambda x: x.flip(0))
"""Along time and against it."""


def _both_forward(cell, weights, keep, gates, number, first, last, hiddens, memories, output):
    steps, batch, _ = gates.shape
    halves = gates.view(steps, batch, 2, -1)
    for direction, turned in enumerate(WAYS):
        row, size = 2 * number + direction, last[0].size(2)
        real = None if keep is None else turned(keep)
        own = turned(halves[:, :, direction]).contiguous()
        h, c = (states.new_empty(steps + 1, batch, size) for states in (hiddens, memories))
        before = [None if states is None else states[row] for states in first]
        forward(cell, weights[direction], real, own, before, [states[row] for states in last], h, c, None)
        halves[:, :, direction] = turned(own)
        for to, states in ((hiddens, h), (memories, c)):
            whole = to[number].view(steps + 2, batch, 2, size)
            whole[direction : direction + steps + 1, :, direction] = turned(states)
        if output is not None:
            outputs = h[1:] if real is None else h[1:].masked_fill(~real.unsqueeze(-1), 0)
            output.view(steps, batch, 2, size)[:, :, direction] = turned(outputs)


def _both_backward(cell, weights, keep, gates, number, memories, grad_output, last, first, grad_gates):
    steps, batch, _ = gates.shape
    size = first.size(3)
    halves, grad_halves = (tensor.view(steps, batch, 2, -1) for tensor in (gates, grad_gates))
    whole = memories[number].view(steps + 2, batch, 2, size)
    for direction, turned in enumerate(WAYS):
        row = 2 * number + direction
        c = turned(whole[direction : direction + steps + 1, :, direction]).contiguous()
        given = None if grad_output is None else turned(grad_output.view(steps, batch, 2, size)[:, :, direction])
        behind = [None if grad is None else grad[row] for grad in last]
        own, own_grad = turned(halves[:, :, direction]).contiguous(), halves.new_empty(steps, batch, halves.size(3))
        real = None if keep is None else turned(keep)
        backward(cell, weights[direction], real, own, c, given, behind, first[:, row], own_grad, None)
        grad_halves[:, :, direction] = turned(own_grad)


def run_at_once(patch):
    """Have both directions of all layers run at once on a CPU, where they can; ``patch``: pytest's."""
    rows = {**dispatch.BACKENDS}
    rows["batched"] = replace(rows["batched"], directions=Directions(_both_forward, _both_backward))
    patch.setattr(dispatch, "BACKENDS", rows)
    patch.setattr(dispatch, "_PROVEN", {})
    patch.setattr(two_directions, "_PROVEN", {})
    patch.setattr(two_directions, "runs_at_once", _runs_at_once)


def _runs_at_once(backend, cell, x, _size):
    return backend != "reference" and cell.has_feedback and x.numel() > 0
