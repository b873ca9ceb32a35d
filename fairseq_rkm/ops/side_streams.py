"""Work beside other work, on CUDA streams of its own: a layer's second direction, and layers of a stack.

A small layer leaves most of a GPU idle, so that several take the time of one. Autograd runs a backward pass on the
stream of its forward pass: there, too, directions run at the same time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_STREAMS: dict[tuple[int, int], list[torch.cuda.Stream]] = {}


def _beside(stream: torch.cuda.Stream, count: int) -> list[torch.cuda.Stream]:
    """The side streams of a stream; it has the same ones at each call."""
    sides = _STREAMS.setdefault((stream.device_index, stream.cuda_stream), [])
    while len(sides) < count:
        side = torch.cuda.Stream(stream.device)
        # PyTorch has 32 streams and hands them out in turns.
        if side.cuda_stream not in {other.cuda_stream for other in (stream, *sides)}:
            sides.append(side)
    return sides[:count]


class Fork:
    """A point of the current stream, after which work may run beside the work that follows.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()
        (self.side,) = _beside(self.stream, 1)

    @contextmanager
    def beside(self, tensors: Iterable[Any]) -> Iterator[None]:
        """Within, work runs on the side stream.

        Args:
            tensors: all that it reads, and that the current stream made; None and others than tensors do no harm. Their
                memory is not used anew before both streams are done with it.
        """
        _keep(tensors, self.side)
        self.side.wait_event(self.event)
        with torch.cuda.stream(self.side):
            yield

    def join(self, tensors: Iterable[Any]) -> None:
        """Have the current stream wait for the side stream, and use the tensors that were made there."""
        self.stream.wait_stream(self.side)
        _keep(tensors, self.stream)


class Lanes:
    """Streams side by side, for pieces of work that wait for some of each other.

    Pieces run behind all work of the current stream before the ``with``, and before all work after it. Lane 0 is the
    current stream. The memory of tensors needs no care if the current stream made them before, or if the lane that
    made them is the only one that uses them. :meth:`hand_over` is for the others.

    Args:
        device: a GPU.
        count: the number of lanes.

    Example:
        >>> with Lanes(x.device, 2) as lanes:
        ...     first = lanes.run(0, lambda: torch.mul(x, 2, out=doubled))
        ...     lanes.run(1, lambda: torch.add(doubled, 1, out=result), first)
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._guard, self._count = torch.cuda.device(device), count

    def __enter__(self) -> "Lanes":
        self._guard.__enter__()
        main = torch.cuda.current_stream()
        self._streams = [main, *_beside(main, self._count - 1)]
        self._now, start = 0, main.record_event()
        for side in self._streams[1:]:
            side.wait_event(start)
        return self

    def __exit__(self, *failure: Any) -> None:
        main, *sides = self._streams
        self._switch(0)
        for side in sides:
            main.wait_stream(side)
        self._guard.__exit__(*failure)

    def run(self, lane: int, work: Callable[[], None], *after: torch.cuda.Event) -> torch.cuda.Event:
        """Run a piece on a lane, behind the lane's earlier pieces.

        Args:
            lane: its number.
            work: launches the piece.
            after: the marks of pieces of other lanes that it waits for.

        Returns:
            The piece's mark.
        """
        stream = self._streams[lane]
        self._switch(lane)
        for mark in after:
            stream.wait_event(mark)
        work()
        return stream.record_event()

    def hand_over(self, tensors: Iterable[Any]) -> None:
        """Have tensors that a lane made used by the current stream, after the ``with``; None does no harm."""
        _keep(tensors, self._streams[0])

    def _switch(self, lane: int) -> None:
        if lane != self._now:
            torch.cuda.set_stream(self._streams[lane])
            self._now = lane


def _keep(tensors: Iterable[Any], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.record_stream(stream)
