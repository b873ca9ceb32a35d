"""Training steps of several small models as branches of one CUDA graph: side by side, with one launch for all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs import GraphRecorder, record


class Branches:
    """Run steps side by side, each on a stream of its own: the first time as they are, then as one graph.

    Each step must leave a GPU room for the others: none may wait for blocks of threads that find no place.

    Args:
        steps: each trains its model by one update, from tensors that stay where they are.
            It returns the loss, ``(1,)``.
        device: of all tensors.
        recording: :func:`~fairseq_rkm.graphs.record`, or a stand-in for tests.
    """

    def __init__(
        self, steps: Sequence[Callable[[], Tensor]], device: torch.device, recording: Callable[..., Any] = record
    ) -> None:
        self.steps = steps
        self.recorder = GraphRecorder(device, recording)
        on_gpu = device.type == "cuda"
        self.streams = [torch.cuda.Stream(device) if on_gpu else None for _ in steps]
        self.losses = torch.zeros(len(steps), device=device)
        self.has_run = False
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> Tensor:
        """Run all steps; their losses, ``(steps,)``."""
        with self.recorder.own_stream():
            if self.has_run and self.replay is None:
                self.replay = self._recorded()
            (self.replay or self._run)()
            self.has_run = True
            return self.losses.clone()

    def _recorded(self) -> Callable[[], None]:
        """The graph of all steps; without one they go on as they are, which takes longer and gives the same."""
        try:
            return self.recorder.record(self._run)
        except RKMError as error:
            print(f"note: {error}; the folds are trained without it", flush=True)
            return self._run

    def _run(self) -> None:
        here = self.recorder.stream
        for number, (step, stream) in enumerate(zip(self.steps, self.streams, strict=True)):
            if stream is None or here is None:
                self.losses[number] = step()[0]
                continue
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                self.losses[number].copy_(step()[0])
        for stream in self.streams:
            if stream is not None and here is not None:
                here.wait_stream(stream)
