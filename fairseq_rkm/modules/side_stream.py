"""Work beside other work: the second direction of a small layer on a CUDA stream of its own.

A small layer leaves most of a GPU idle, so that both directions take the time of one. Autograd runs a backward pass on
the stream of its forward pass: there, too, the directions run at the same time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_STREAMS: dict[tuple[int, int], torch.cuda.Stream] = {}


class Fork:
    """A point of the current stream, after which work may run beside the work that follows.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()
        key = self.stream.device_index, self.stream.cuda_stream
        if key not in _STREAMS:
            _STREAMS[key] = torch.cuda.Stream(device)
        self.side = _STREAMS[key]

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


def _keep(tensors: Iterable[Any], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            tensor.record_stream(stream)
