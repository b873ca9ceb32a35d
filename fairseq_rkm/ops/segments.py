"""A batch of sequences that begin anew here and there, cut into its segments, which are rows of another batch.

No backend knows of resets. A row's first segment takes the given state, the others the fresh one. Segments of like
length run together, so that padding at most doubles the work.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairseq_rkm.ops import exported_loop
from fairseq_rkm.ops.plain_tensors import are_plain

Fresh = tuple[Tensor | None, Tensor | None]
"""The hidden state and the memory, ``(d,)`` each, that a reset begins with; None stands for zeros."""
MOST_PADDING = 2
"""A group of segments takes at most this many times the steps that it holds."""


class Group(NamedTuple):
    """Segments that run together, ``S`` of them.

    Attributes:
        rows: ``(S,)`` int64, the row of each in the batch.
        starts: ``(S,)`` int64, its first step.
        lengths: ``(S,)`` int64, its number of steps.
        goes_on: ``(S,)`` bool, whether it takes the given state and context, and not the fresh ones.
        steps: the steps of the longest.
        even: whether all are as long.
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    goes_on: Tensor
    steps: int
    even: bool

    def inputs(self, inputs: Tensor, ngram: int, ahead: int) -> Tensor:
        """The segments' extended inputs, ``(steps + n - 1, S, m)``; no window reaches beyond its segment."""
        before = ngram - 1 - ahead
        step = torch.arange(self.steps + ngram - 1, device=inputs.device).unsqueeze(1)
        taken = self._take(inputs, step)
        if ngram == 1 and self.even:
            return taken
        inside = (step < self.lengths + before) & ((step >= before) | self.goes_on)
        return taken.masked_fill(~inside.unsqueeze(-1), 0)

    def keep(self, keep: Tensor | None) -> Tensor | None:
        """The segments' real steps, ``(steps, S)`` bool; None if all are real."""
        if keep is None and self.even:
            return None
        step = torch.arange(self.steps, device=self.rows.device).unsqueeze(1)
        inside = step < self.lengths
        return inside if keep is None else self._take(keep, step) & inside

    def state(self, given: Tensor | None, fresh: Tensor | None) -> Tensor | None:
        """The states, ``(S, d)``, that the segments begin with, from ``(B, d)`` and ``(d,)``; None stands for zeros."""
        if given is None:
            return None if fresh is None else torch.where(self.goes_on.unsqueeze(1), 0.0, fresh)
        begun = given.index_select(0, self.rows)
        return torch.where(self.goes_on.unsqueeze(1), begun, 0.0 if fresh is None else fresh)

    def _take(self, tensor: Tensor, step: Tensor) -> Tensor:
        """Read ``(T, B, ...)`` at each segment's steps; beyond the end, anything."""
        index = ((self.starts + step) * tensor.size(1) + self.rows).clamp(max=tensor.size(0) * tensor.size(1) - 1)
        return tensor.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


class Segments(NamedTuple):
    """All segments of a batch.

    Attributes:
        groups: the segments, the longest first.
        places: ``(T * B,)`` int64, the place of each step of each row in the groups' outputs, one after the other.
        last: ``(B,)`` int64, the number of each row's last segment, counted over the groups.
    """

    groups: list[Group]
    places: Tensor
    last: Tensor

    def run(self, run: Callable[[Group], tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """The rows' outputs, ``(T, B, d)``, and final states from those of each group."""
        outputs, hiddens, memories = zip(*map(run, self.groups), strict=True)
        output = torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self.places)
        hidden, memory = (torch.cat(states).index_select(0, self.last) for states in (hiddens, memories))
        return output.view(-1, self.last.size(0), output.size(1)), hidden, memory


class Reset:
    """The steps before which a sequence begins anew, in one direction of travel.

    Args:
        mask: ``(T, B)`` bool, True where the state is as at a sequence's start before the step.
        host: the same in the host's memory; None lets it be read once it is needed.
    """

    def __init__(self, mask: Tensor, host: Tensor | None = None) -> None:
        self.mask = mask
        self._host = host
        self._segments: Segments | None = None
        self._backward: Reset | None = None

    @property
    def host(self) -> Tensor | None:
        """The mask in the host's memory; None where it may not be read. A single step is not worth the reading."""
        if self._host is None and not exported_loop.is_recording() and self.mask.size(0) > 1 and _may_read(self.mask):
            self._host = self.mask.cpu()
        return self._host

    @property
    def nowhere(self) -> bool:
        """Whether it is known that nothing begins anew."""
        return self.host is not None and not self.host.any()

    @property
    def at_first_alone(self) -> bool:
        """Whether it is known that no step but the first begins anew."""
        return self.mask.size(0) <= 1 or (self.host is not None and not self.host[1:].any())

    def backward(self) -> "Reset":
        """The same boundaries for the other direction: from step t to step t - 1 the state begins anew."""
        if self._backward is None:
            self._backward = Reset(_turned(self.mask), None if self.host is None else _turned(self.host))
        return self._backward

    def segments(self) -> Segments | None:
        """The batch cut at all resets; None if the host does not know the mask."""
        if self._segments is None and self.host is not None:
            self._segments = _cut(self.host.numpy(), self.mask)
        return self._segments


def _may_read(mask: Tensor) -> bool:
    """Whether the host may read the mask now."""
    if torch.compiler.is_compiling() or not are_plain(mask):
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _turned(mask: Tensor) -> Tensor:
    return torch.cat([mask.new_zeros(1, mask.size(1)), mask.flip(0)])[:-1]


def _cut(host: np.ndarray, mask: Tensor) -> Segments:
    """Cut the rows of ``(T, B)`` at each True, sort the segments by length and group them."""
    steps, batch = host.shape
    begins = host.T.copy()
    begins[:, 0] = True
    rows, starts = np.nonzero(begins)
    ends = np.append(starts[1:], steps)
    ends[ends == 0] = steps  # the next segment is the next row's first
    lengths = ends - starts
    order = np.argsort(-lengths, kind="stable")
    goes_on = (starts == 0) & ~host[0, rows]
    sizes = _group_sizes(lengths[order])
    # For each segment, in order of length: its row, start, length and state, and the place of its first output.
    first = np.cumsum([0, *(lengths[order[at]] * size for at, size in zip(_firsts(sizes), sizes, strict=True))])
    place = np.concatenate([first[i] + np.arange(size) for i, size in enumerate(sizes)])
    table = np.stack([rows[order], starts[order], lengths[order], goes_on[order], place, np.repeat(sizes, sizes)])
    # For each segment in order of rows: its number in the order of length.
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    last = number[np.cumsum(np.bincount(rows, minlength=batch)) - 1]
    flat = torch.from_numpy(np.concatenate([table.ravel(), number, last])).to(mask.device, non_blocking=True)
    columns = flat[: table.size].view(table.shape)
    number_of, last_of = flat[table.size : -batch], flat[-batch:]

    anew = mask.t().clone()
    anew[:, 0] = True
    segment = number_of[anew.flatten().cumsum(0) - 1].view(batch, steps).t()
    step = torch.arange(steps, device=mask.device).unsqueeze(1)
    places = columns[4][segment] + (step - columns[1][segment]) * columns[5][segment]
    groups = []
    for at, size in zip(_firsts(sizes), sizes, strict=True):
        row, start, length, on = columns[:4, at : at + size]
        longest, shortest = int(lengths[order[at]]), int(lengths[order[at + size - 1]])
        groups.append(Group(row, start, length, on.bool(), longest, longest == shortest))
    return Segments(groups, places.flatten(), last_of)


def _firsts(sizes: list[int]) -> np.ndarray:
    """The number of each group's first segment."""
    return np.cumsum([0, *sizes])[:-1]


def _group_sizes(lengths: np.ndarray) -> list[int]:
    """The sizes of the groups of segments whose lengths, from the longest, are given.

    A group takes further, shorter segments as long as padding at most doubles its work. The next one begins with less
    than half of the length: there are few groups.
    """
    sizes, at = [], 0
    while at < len(lengths):
        rest = lengths[at:]
        padded = rest[0] * np.arange(1, len(rest) + 1)
        too_much = padded > MOST_PADDING * np.cumsum(rest)
        sizes.append(int(too_much.argmax()) if too_much.any() else len(rest))
        at += sizes[-1]
    return sizes
