"""CUDA graphs: what a function launches, recorded once and then launched as a whole, which spares the host the work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError

Run = Callable[[], None]


def record(run: Run, pool: Any) -> Run:
    """Record what ``run`` launches on this stream, without doing it; what is returned does it, at the same addresses.

    Raises:
        RKMError: a step that asks the GPU for something while it is recorded.
    """
    # What ran once found room in what PyTorch holds, and will in as much beside it. If that is not free, PyTorch must
    # give back what it keeps for later now, since it cannot while it records. torch.cuda.graph has it do so each time,
    # and all of it is then to be allocated anew.
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
        raise RKMError(f"a training step could not be recorded ({reason}): train without --cuda-graphs") from error
    replay: Run = graph.replay
    return replay


class GraphRecorder:
    """A stream on which to record and replay, and memory that all graphs share, since one runs at a time.

    What is to be recorded must have run once, without a graph, on this stream: so all that is done only once is done
    then (compiling kernels, loading them, choosing among them), and PyTorch, which adds a weight's gradients up on the
    stream on which the weight was first used, as long as anything of that pass is held, does so on this one.

    Args:
        device: of all that is recorded; nothing of this matters on a CPU.
        recorder: :func:`record`.
    """

    def __init__(self, device: torch.device, recorder: Callable[[Run, Any], Run] = record) -> None:
        self.recorder = recorder
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record(self, run: Run) -> Run:
        """What does again, at the same addresses, what ``run`` does."""
        return self.recorder(run, self.pool)

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
