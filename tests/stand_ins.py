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


def _both_forward(cell, weights, keep, gates, hidden, memory):
    steps, batch, width = gates.shape
    size = width // (2 * len(cell.gates))
    wide = torch.promote_types(gates.dtype, torch.float32)
    output = gates.new_empty(steps, batch, 2 * size)
    all_h, all_c = (gates.new_empty(steps + 2, batch, 2, size, dtype=kind) for kind in (gates.dtype, wide))
    last = gates.new_empty(2, batch, size), gates.new_empty(2, batch, size, dtype=wide)
    for number, turned in enumerate((lambda x: x, lambda x: x.flip(0))):
        real = None if keep is None else turned(keep)
        own = turned(gates.view(steps, batch, 2, -1)[:, :, number]).contiguous()
        h, c = (states.new_empty(steps + 1, batch, size) for states in (all_h, all_c))
        first = [None if states is None else states[number] for states in (hidden, memory)]
        forward(cell, weights[number], real, own, first, [states[number] for states in last], h, c, None)
        gates.view(steps, batch, 2, -1)[:, :, number] = turned(own)
        for to, states in ((all_h, h), (all_c, c)):
            to[number : number + steps + 1, :, number] = turned(states)
        output.view(steps, batch, 2, size)[:, :, number] = turned(
            h[1:] if real is None else h[1:].masked_fill(~real.unsqueeze(-1), 0)
        )
    return output, *last, all_h.flatten(2), all_c.flatten(2)


def _both_backward(cell, weights, keep, gates, memories, grads):
    steps, batch, _ = gates.shape
    halves = gates.view(steps, batch, 2, -1)
    size = memories.size(2) // 2
    grad_gates, first = torch.empty_like(halves), memories.new_empty(2, 2, batch, size)
    for number, turned in enumerate((lambda x: x, lambda x: x.flip(0))):
        c = turned(memories.view(steps + 2, batch, 2, size)[number : number + steps + 1, :, number])
        given = None if grads[0] is None else turned(grads[0].view(steps, batch, 2, size)[:, :, number])
        last = [None if grad is None else grad[number] for grad in grads[1:]]
        own, own_grad = turned(halves[:, :, number]).contiguous(), halves.new_empty(steps, batch, halves.size(3))
        real = None if keep is None else turned(keep)
        backward(cell, weights[number], real, own, c.contiguous(), given, last, first[:, number], own_grad, None)
        grad_gates[:, :, number] = turned(own_grad)
    return grad_gates.flatten(2), first[0], first[1]


def run_at_once(patch):
    """Have both directions of all layers run at once on a CPU, where they can; ``patch``: pytest's."""
    rows = {**dispatch.BACKENDS}
    rows["batched"] = replace(rows["batched"], directions=Directions(_both_forward, _both_backward))
    patch.setattr(dispatch, "BACKENDS", rows)
    patch.setattr(dispatch, "_PROVEN", {})
    patch.setattr(two_directions, "runs_at_once", _runs_at_once)


def _runs_at_once(backend, cell, x, _size):
    return backend != "reference" and cell.has_feedback and x.numel() > 0
