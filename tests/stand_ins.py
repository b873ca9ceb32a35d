"""Stands in for a GPU in tests of layers that run side by side: streams without a GPU, and stretches by ``batched``."""

import random
from functools import partial

import torch

from fairseq_rkm.ops import wavefront, wavefront_plan
from fairseq_rkm.ops.backends import batched
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
