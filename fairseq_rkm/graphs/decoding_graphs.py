"""Single steps of decoding replayed as CUDA graphs, one graph for each shape of a step's inputs."""

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
"""The number of graphs kept; a further one replaces the one longest unused."""
MOST_ELEMENTS = 1 << 25
"""The most elements of a step's inputs. Beyond, the GPU takes longer than the host, and graphs save nothing."""

Step = Callable[..., tuple[Tensor, ...]]
Kind = tuple[Hashable, ...]


class _Recorded(NamedTuple):
    """A graph, its input and output tensors at fixed addresses, and their number of rows."""

    rows: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    replay: Run


class DecodingGraphs:
    """Replay a decoder's steps: a step costs the host one launch, and a few to copy its inputs and outputs.

    The batch is the first dimension of all of a step's inputs and outputs, and no row depends on another. A graph
    therefore serves every batch of at most its recorded rows, and one that shrinks as sentences finish. Further rows
    are not read. New shapes first run without a graph, and are recorded when met again.

    Graphs outlive their sequence and read the weights at fixed addresses. Call :meth:`hold` with the present weights at
    the start of each sequence. Graphs belong to this process: a copied or unpickled object starts without any.

    Args:
        record: :func:`~fairseq_rkm.graphs.recording.record`, or a stand-in for tests.

    Example:
        >>> graphs = DecodingGraphs()
        >>> steppers = graphs.hold([Stepper(layer) for layer in layers], [embedding.weight])  # once a sequence
        >>> logits, hidden = graphs(step, [tokens, hidden])  # at each step; ``step`` reads ``steppers``
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
        """Whether steps with inputs like this tensor can be replayed: on a GPU, outside autocast and recordings."""
        return (
            like.is_cuda
            and not self.refused
            and not torch.is_autocast_enabled()  # its cache of cast weights would lie in a graph's memory
            and not torch.cuda.is_current_stream_capturing()
        )

    def hold(self, steppers: list[Stepper], others: Iterable[Tensor]) -> list[Stepper]:
        """Begin a sequence: give the graphs the present weights.

        The graphs read the steppers held before. If all weights have kept their place, shape and dtype, the new
        steppers' weights are copied into the held ones. Otherwise all graphs are forgotten and the new steppers are
        held. Where steps cannot be replayed, nothing is held: steps that read the steppers must run without graphs.

        Args:
            steppers: one for each layer of the decoder, packed now.
            others: all other weights that a step reads.

        Returns:
            The steppers to use in this sequence; their weights equal the given ones'.
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
        """Run the step: replay its graph, or call ``step(*inputs)`` where there is none.

        Args:
            step: a function from tensors to tensors, without gradients. It must be the same function of the inputs, the
                weights and the constants at each call.
            inputs: tensors with the batch first. The first one sets the number of rows; others may have more.
            constants: everything else that the result depends on.

        Returns:
            The step's outputs, each with as many rows as the first input.
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
        """The graph for these inputs; None means that the step runs without."""
        kind: Kind = (*((x.shape[1:], x.dtype) for x in inputs), *constants)
        rows = max(x.size(0) for x in inputs)
        try:
            return self.recorded.find(kind, lambda: _make(recorder, step, inputs, rows), rows)
        except RKMError as error:
            logger.warning(f"{error}: decoding goes on without")
            self.refused = True
            return None


def _make(recorder: GraphRecorder, step: Step, inputs: Sequence[Tensor], rows: int) -> _Recorded:
    """Record a graph of the step for ``rows`` rows."""
    outputs: list[Tensor] = []
    with recorder.own_stream():
        # Some inputs are indices of rows. Zeros are valid indices in the rows beyond a batch.
        held = [x.new_zeros(rows, *x.shape[1:]) for x in inputs]

        def run() -> None:
            outputs[:] = step(*held)

        return _Recorded(rows, held, outputs, recorder.record(run))


def _replay(graph: _Recorded, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Replay, and return copies of the outputs, safe from the next replay."""
    copy_all([held[: x.size(0)] for held, x in zip(graph.inputs, inputs, strict=True)], inputs)
    graph.replay()
    left = [output[: inputs[0].size(0)] for output in graph.outputs]
    outputs = [torch.empty_like(x) for x in left]
    copy_all(outputs, left)
    return tuple(outputs)


def _like(weight: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return weight.shape, weight.dtype, weight.device
