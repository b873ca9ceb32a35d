"""CUDA graphs: a function's launches are recorded once and then replayed with one launch, to spare the host.

This file holds recording, replaying, the rule of when to record, and the refusals. Graphs of functions, of decoding, of
training steps and of dynamic evaluation use it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError

Run = Callable[[], None]
Key = TypeVar("Key")
Recorded = TypeVar("Recorded")

NEEDS_GPU = "needs a CUDA GPU (and no --cpu)"


def refuse(asked: str, refusals: Mapping[str, bool]) -> None:
    """Raise RKMError for the first reason that applies.

    Args:
        asked: the flag that asked for graphs; it begins the sentence.
        refusals: whether each reason applies, by the words that end the sentence.
    """
    for reason, applies in refusals.items():
        if applies:
            raise RKMError(f"{asked} {reason}")


def record(run: Run, pool: Any) -> Run:
    """Record the launches of ``run`` on the current stream; they are recorded and do not run.

    Args:
        run: a function that has run once on this stream.
        pool: the memory pool of the graph, from ``torch.cuda.graph_pool_handle``.

    Returns:
        A function that replays the launches, at the same addresses.

    Raises:
        RKMError: ``run`` waits for the GPU, or does something else that cannot be recorded.
    """
    # ``run`` needs as much memory again as it took in its first run. If too little is free, PyTorch must release unused
    # memory now: it cannot while it records. torch.cuda.graph releases it each time, and must allocate it all anew.
    if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        # The rules of recording bind this thread alone: fairseq prepares batches in another.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RKMError(f"a CUDA graph could not be recorded ({reason})") from error
    replay: Run = graph.replay
    return replay


class GraphRecorder:
    """A stream to record and replay on, and memory for all graphs; they share it, since one runs at a time.

    A function must run once on this stream, without a graph, before it is recorded. The first run compiles, loads and
    chooses kernels. It also ties the weights' gradients to this stream: PyTorch adds them up where a weight was first
    used.

    Args:
        device: the device of all tensors; a CPU has no stream.
        record: :func:`record`, or a stand-in for tests.
        remedy: the end of the sentence when a recording fails; it says how to do without.
    """

    def __init__(
        self, device: torch.device, record: Callable[[Run, Any], Run] = record, remedy: str | None = None
    ) -> None:
        self._record, self.remedy = record, remedy
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, run: Run) -> Run:
        """Record ``run``, and return a function that repeats it at the same addresses.

        Raises:
            RKMError: ``run`` cannot be recorded.
        """
        try:
            return self._record(run, self.pool)
        except RKMError as error:
            if self.remedy is None:
                raise
            raise RKMError(f"{error}: {self.remedy}") from error

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Work within runs on the graphs' stream, after all work before it and before all work after it."""
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)


class Recordings(Generic[Key, Recorded]):
    """Recordings by key, up to a limit: a key first runs without a recording, and is recorded when met again.

    Args:
        most: the number of recordings kept.
        replace: True lets a further recording replace the one longest unused. False lets its key do without.
    """

    def __init__(self, most: int, replace: bool = False) -> None:
        self.most, self.replace = most, replace
        self.met: dict[Key, int] = {}
        self._made: OrderedDict[Key, tuple[int, Recorded]] = OrderedDict()

    def find(self, key: Key, make: Callable[[], Recorded], rows: int = 0) -> Recorded | None:
        """The recording of a key for at least ``rows`` rows, made by ``make`` if due. None means to do without."""
        known = self._made.get(key)
        if known is None or known[0] < rows:
            if self.met.get(key, -1) < rows:
                self.met[key] = rows
                return None
            if known is None and not self.replace and len(self._made) >= self.most:
                return None
            known = self._made[key] = rows, make()
        self._made.move_to_end(key)
        if len(self._made) > self.most:
            self._made.popitem(last=False)
        return known[1]

    def clear(self) -> None:
        """Forget all recordings and all keys."""
        self._made.clear()
        self.met.clear()

    def __iter__(self) -> Iterator[Key]:
        """The recorded keys, the one longest unused first."""
        return iter(self._made)

    def values(self) -> list[Recorded]:
        """The recordings in the order of their keys."""
        return [recorded for _, recorded in self._made.values()]

    def __len__(self) -> int:
        return len(self._made)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Any]) -> None:
    """Copy each source to its target, the contiguous ones with one launch for each dtype."""
    groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Any]]] = {}
    for target, source in zip(targets, sources, strict=True):
        # With one tensor that is not contiguous, PyTorch would copy its whole group one by one.
        kind = target.dtype, target.is_contiguous() and source.is_contiguous()
        group = groups.setdefault(kind, ([], []))
        group[0].append(target)
        group[1].append(source)
    for to, of in groups.values():
        torch._foreach_copy_(to, of)
