"""CUDA graphs: a function's launches are recorded once and then made as a whole, so that the host has less to do.

Here stand recording, replaying, the rule of when to record, and the refusals; graphs of functions, of decoding and of
training steps use them.
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
NEEDS_ONE_PROCESS = "is for one process"


def refuse(asked: str, refusals: Mapping[str, bool]) -> None:
    """Raises RKMError with the first of the reasons that apply, after the flag that asked for graphs."""
    for reason, applies in refusals.items():
        if applies:
            raise RKMError(f"{asked} {reason}")


def record(run: Run, pool: Any) -> Run:
    """Record the launches of ``run`` on this stream without making them; the result makes them, at the same addresses.

    Raises:
        RKMError: ``run`` asks the GPU for something, which cannot be recorded.
    """
    # ``run`` has run once in the memory that PyTorch holds, and will need as much again. If that is not free, PyTorch
    # must give back unused memory now, since it cannot while it records. torch.cuda.graph does so each time, and all of
    # it is then allocated anew.
    if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved():
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        # Only this thread is held to what may be recorded: fairseq prepares batches in another.
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
    """A stream on which to record and replay, and memory that all graphs share, since one runs at a time.

    A function must have run once, without a graph, on this stream before it is recorded. Then kernels have been
    compiled, loaded and chosen; and PyTorch adds a weight's gradients up on the stream on which the weight was first
    used, which is this one.

    Args:
        device: of all tensors; on a CPU there is no stream.
        record: :func:`record`, or what stands in for it.
        remedy: ends the sentence of a recording that fails.
    """

    def __init__(
        self, device: torch.device, record: Callable[[Run, Any], Run] = record, remedy: str | None = None
    ) -> None:
        self._record, self.remedy = record, remedy
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, run: Run) -> Run:
        """A function that does the same as ``run`` at the same addresses.

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
        """Within, all is done on the stream of the graphs, after what is before and before what comes after."""
        if self.stream is None:
            yield
            return
        outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)


class Recordings(Generic[Key, Recorded]):
    """Recordings by key: a key is met once without one, and recorded when it is met again, up to a limit.

    Args:
        most: recordings that are kept.
        replace: a recording beyond takes the place of the one longest unused; otherwise its key is done without.
    """

    def __init__(self, most: int, replace: bool = False) -> None:
        self.most, self.replace = most, replace
        self.met: dict[Key, int] = {}
        self._made: OrderedDict[Key, tuple[int, Recorded]] = OrderedDict()

    def find(self, key: Key, make: Callable[[], Recorded], rows: int = 0) -> Recorded | None:
        """The recording of a key for at least so many rows, made by ``make`` if it has to be; None to do without."""
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
        """Forget all recordings, and all keys that have been met."""
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
    """Copy tensors to tensors: those that are contiguous in one launch for each type."""
    groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Any]]] = {}
    for target, source in zip(targets, sources, strict=True):
        # One that is not would have PyTorch copy all of its group one by one.
        kind = target.dtype, target.is_contiguous() and source.is_contiguous()
        group = groups.setdefault(kind, ([], []))
        group[0].append(target)
        group[1].append(source)
    for to, of in groups.values():
        torch._foreach_copy_(to, of)
