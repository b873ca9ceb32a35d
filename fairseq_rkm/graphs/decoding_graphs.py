"""Single steps of decoding replayed as CUDA graphs, one for each shape of what a step reads."""

import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, Run, copy_all, record
from fairseq_rkm.modules.stepping import Stepper

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16
"""Graphs that are kept; of more the one longest unused goes."""
MOST_ELEMENTS = 1 << 25
"""Elements that a step may read: with more the GPU takes longer than the host, which graphs spare."""

Step = Callable[..., tuple[Tensor, ...]]
Kind = tuple[Hashable, ...]


class _Recorded(NamedTuple):
    """A graph, the tensors at which it finds its inputs and leaves its outputs, and how many rows they have."""

    rows: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    replay: Run


class DecodingGraphs:
    """Replay a decoder's steps: what a step launches costs the host one launch, and a few for what goes in and out.

    All of a step's inputs and outputs have the batch as their first dimension, and no row depends on another. So a
    graph serves every batch of at most the rows that it was recorded with, and goes on serving one that shrinks when
    sentences are finished; the rows beyond compute what nobody reads. A step is done once without a graph, and recorded
    when its shapes are met again.

    Graphs outlive the sequence for which they were recorded, and read weights where those were then:
    :meth:`hold` is to be told at the beginning of each sequence which there are now. They are of this process: a copy,
    or what is loaded from a pickle, begins without any.

    Args:
        record: :func:`~fairseq_rkm.graphs.recording.record`.
    """

    def __init__(self, record: Callable[[Run, Any], Run] = record) -> None:
        self._record = record
        self.recorder: Optional[GraphRecorder] = None
        self.steppers: list[Stepper] = []
        self.places: list[Any] = []
        self.recorded: Recordings[Kind, _Recorded] = Recordings(MOST_GRAPHS, replace=True)
        self.refused = False
        self.lock = threading.Lock()  # threads that decode with one model share a graph's inputs and outputs

    def __reduce__(self) -> tuple:
        return type(self), (self._record,)

    def available(self, like: Tensor) -> bool:
        """Whether steps that read such a tensor can be replayed."""
        return (
            like.is_cuda
            and not self.refused
            and not torch.is_autocast_enabled()  # which would keep what it casts in a graph's memory
            and not torch.cuda.is_current_stream_capturing()
        )

    def hold(self, steppers: list[Stepper], others: Iterable[Tensor]) -> list[Stepper]:
        """Begin a sequence.

        Args:
            steppers: of the decoder's layers, as packed now.
            others: all other weights that a step reads.

        Returns:
            Steppers of the same weights for the steps of the sequence: those of before, into which the weights are
            copied, or if something has moved or is of another shape or type, those given, and all graphs are forgotten.
            Where steps cannot be replayed those given, which are not held: what reads them must be done without graphs.
        """
        if not self.available(steppers[0].tensors()[0]):
            return steppers
        places: list[Any] = [torch.is_inference_mode_enabled(), *(weight.data_ptr() for weight in others)]
        given, held = ([w for stepper in each for w in stepper.tensors()] for each in (steppers, self.steppers))
        with self.lock:
            if places == self.places and [_like(w) for w in given] == [_like(w) for w in held]:
                copy_all(held, given)
            else:
                self.recorded.clear()
                self.recorder, self.steppers, self.places = None, steppers, places
            return self.steppers

    def __call__(self, step: Step, inputs: Sequence[Tensor], *constants: Hashable) -> tuple[Tensor, ...]:
        """What the step returns for these inputs: replayed, or if it has to be, done.

        Args:
            step: of tensors without gradients to tensors without gradients; the same function of them, the weights and
                the constants each time.
            inputs: as many of them as the first has rows, or more, are what the step reads of each.
            constants: whatever else it depends on.

        Returns:
            As many rows of each output as the first input has.
        """
        if not self.available(inputs[0]) or sum(x.numel() for x in inputs) > MOST_ELEMENTS:
            return step(*inputs)
        with self.lock:
            if self.recorder is None:
                self.recorder = GraphRecorder(inputs[0].device, self._record)
            graph = self._find(self.recorder, step, inputs, constants)
            if graph is not None:
                return _replay(graph, inputs)
            with self.recorder.own_stream():
                return step(*inputs)

    def _find(
        self, recorder: GraphRecorder, step: Step, inputs: Sequence[Tensor], constants: Kind
    ) -> Optional[_Recorded]:
        """A graph for these inputs, or None if the step is to be done without."""
        kind: Kind = (*((x.shape[1:], x.dtype) for x in inputs), *constants)
        rows = max(x.size(0) for x in inputs)
        try:
            return self.recorded.find(kind, lambda: _make(recorder, step, inputs, rows), rows)
        except RKMError as error:
            logger.warning(f"{error}: decoding goes on without")
            self.refused = True
            return None


def _make(recorder: GraphRecorder, step: Step, inputs: Sequence[Tensor], rows: int) -> _Recorded:
    """A graph of the step for so many rows."""
    outputs: list[Tensor] = []
    with recorder.own_stream():
        # Zeros, since some are numbers of rows: those beyond a batch must be of rows that there are.
        held = [x.new_zeros(rows, *x.shape[1:]) for x in inputs]

        def run() -> None:
            outputs[:] = step(*held)

        return _Recorded(rows, held, outputs, recorder.record(run))


def _replay(graph: _Recorded, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of their own, which the next replay leaves alone."""
    copy_all([held[: x.size(0)] for held, x in zip(graph.inputs, inputs, strict=True)], inputs)
    graph.replay()
    left = [output[: inputs[0].size(0)] for output in graph.outputs]
    outputs = [torch.empty_like(x) for x in left]
    copy_all(outputs, left)
    return tuple(outputs)


def _like(weight: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return weight.shape, weight.dtype, weight.device
