"""A language model's passes over the segments of a stream for dynamic evaluation, replayed as CUDA graphs on a GPU.

A segment of five words is some hundred launches: they take the host several times longer than the GPU. As graphs it is
two: one scores the segment, the other learns it. They share their memory. So a segment is learned before the next one
is scored, or never.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs import recording
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, Run, copy_all
from fairseq_rkm.modules import RKMState
from fairseq_rkm.modules.dynamic_evaluation import DynamicEvaluation
from fairseq_rkm.modules.state import state_tensors
from fairseq_rkm.ops.segments import Reset

logger = logging.getLogger(__name__)

States = list[RKMState]
MOST_SEGMENT_SHAPES = 16
"""The most recorded shapes of segments, for each kind of pass. Further shapes go without a graph."""


class Scored(NamedTuple):
    """A scored segment.

    Attributes:
        logits: ``(B, T, V)``.
        features: the last layer's output, ``(T, B, d)``.
        entered: the states before the segment; None for zeros.
        left: the states after it.
        learn: learns the segment, given its targets ``(B, T)``; before another segment is scored.
    """

    logits: Tensor
    features: Tensor
    entered: Optional[States]
    left: States
    learn: Callable[[Tensor], None]


class _Graphs(NamedTuple):
    """The recorded passes of one shape, and the tensors that they read and write."""

    tokens: Tensor
    target: Tensor
    entered: States
    left: States
    outputs: list[Tensor]
    replays: list[Run]


class SegmentPasses:
    """Passes of one decoder.

    A shape runs without graphs until all of its kernels have run, and is recorded when met again
    (:class:`~fairseq_rkm.graphs.recording.Recordings`). The first segment of a text, sentences that begin anew, a
    module with hooks and autocast do without. So does everything after a pass that cannot be recorded.

    Args:
        decoder: with a plain softmax, in evaluation.
        dynamic: learns.
        record: :func:`~fairseq_rkm.graphs.recording.record`, or a test's substitute, perhaps for a CPU.
    """

    def __init__(self, decoder: Any, dynamic: DynamicEvaluation, record: Callable) -> None:
        self.decoder, self.dynamic = decoder, dynamic
        device = dynamic.trained[0].device
        self.recorder = GraphRecorder(device, record)
        self.without = device.type != "cuda" and record is recording.record
        self.modules = list(decoder.modules())
        self.learned: set[torch.Size] = set()
        self.scoring: Recordings[Hashable, _Graphs] = Recordings(MOST_SEGMENT_SHAPES)
        # It stays for as long as the other: memory of graphs that are all gone cannot be used for further ones.
        self.measuring: Recordings[Hashable, _Graphs] = Recordings(MOST_SEGMENT_SHAPES)

    def score(self, tokens: Tensor, states: Optional[States], reset: Optional[Reset]) -> Scored:
        """Score a segment.

        Args:
            tokens: ``(B, T)`` int64.
            states: the states to start from; None for zeros.
            reset: where a sentence begins anew.
        """
        with self.recorder.own_stream():
            known = tokens.shape in self.learned
            graphs = self._find(self.scoring, self._record_scoring, tokens, states, reset) if known else None
            if graphs is None or states is None:
                return self._score_plainly(tokens, states, reset)
            _enter(graphs, tokens, states)
            graphs.replays[0]()
            logits, features = (output.clone() for output in graphs.outputs)
            return Scored(logits, features, graphs.entered, graphs.left, lambda target: self._learn(graphs, target))

    def measure(self, tokens: Tensor, target: Tensor, states: Optional[States], reset: Optional[Reset]) -> States:
        """Add the squares of a segment's gradients to the statistics, and return the states after it."""
        with self.recorder.own_stream():
            graphs = self._find(self.measuring, self._record_measuring, tokens, states, reset)
            if graphs is not None and states is not None:
                _enter(graphs, tokens, states)
                graphs.target.copy_(target)
                graphs.replays[0]()
                return graphs.left
            _, logits, left = self._forward(tokens, states, reset)
            self.dynamic.add_squares(self._loss(logits, target))
            return left

    def _find(
        self, recordings: Recordings[Hashable, _Graphs], make: Callable[[Tensor, States], _Graphs],
        tokens: Tensor, states: Optional[States], reset: Optional[Reset],
    ) -> Optional[_Graphs]:  # fmt: skip
        """Return the graphs for a segment, made by ``make`` if due; None means to do without."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)
        if self.without or states is None or reset is not None or hooked or torch.is_autocast_enabled():
            return None
        try:
            return recordings.find(tokens.shape, lambda: make(tokens, states))
        except RKMError as error:
            logger.warning(f"{error}: dynamic evaluation goes on without")
            self.without = True
            return None

    def _score_plainly(self, tokens: Tensor, states: Optional[States], reset: Optional[Reset]) -> Scored:
        features, logits, left = self._forward(tokens, states, reset)

        def learn(target: Tensor) -> None:
            with self.recorder.own_stream():
                self.dynamic.learn(self._loss(logits, target))
            if states is not None:
                self.learned.add(tokens.shape)

        return Scored(logits.detach(), features.detach(), states, left, learn)

    def _learn(self, graphs: _Graphs, target: Tensor) -> None:
        with self.recorder.own_stream():
            graphs.target.copy_(target)
            graphs.replays[1]()

    def _record_scoring(self, tokens: Tensor, states: States) -> _Graphs:
        graphs = _tensors(tokens, states)
        scored: list[Tensor] = []

        def score() -> None:
            features, logits, left = self._forward(graphs.tokens, graphs.entered, None)
            scored[:] = [logits]  # it keeps all that learning needs
            _leave(graphs, left, [logits.detach(), features.detach()])

        def learn() -> None:
            self.dynamic.learn(self._loss(scored.pop(), graphs.target))

        graphs.replays[:] = [self.recorder.record(score), self.recorder.record(learn)]
        return graphs

    def _record_measuring(self, tokens: Tensor, states: States) -> _Graphs:
        graphs = _tensors(tokens, states)

        def measure() -> None:
            _, logits, left = self._forward(graphs.tokens, graphs.entered, None)
            self.dynamic.add_squares(self._loss(logits, graphs.target))
            _leave(graphs, left, [])

        graphs.replays[:] = [self.recorder.record(measure)]
        return graphs

    def _forward(
        self, tokens: Tensor, states: Optional[States], reset: Optional[Reset]
    ) -> tuple[Tensor, Tensor, States]:
        """Return the last layer's output, logits, both with their graph, and the states without it."""
        with torch.enable_grad():
            outputs, left = self.decoder.run(tokens, states, None, reset)
            features = self.decoder.dropout_output(outputs)
            logits = self.decoder.output_layer(features.transpose(0, 1).contiguous())
        return features, logits, [state.detach() for state in left]

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=self.decoder.padding_idx)


def _tensors(tokens: Tensor, states: States) -> _Graphs:
    """Return places for the inputs and outputs of a segment."""
    entered, left = ([state.map(torch.empty_like) for state in states] for _ in range(2))
    return _Graphs(tokens.clone(), tokens.clone(), entered, left, [], [])


def _enter(graphs: _Graphs, tokens: Tensor, states: States) -> None:
    copy_all([graphs.tokens, *state_tensors(graphs.entered)], [tokens, *state_tensors(states)])


def _leave(graphs: _Graphs, left: States, outputs: list[Tensor]) -> None:
    """Copy results to their places. These outlast the memory that graphs share."""
    if not graphs.outputs:
        graphs.outputs.extend(torch.empty_like(output) for output in outputs)
    copy_all([*state_tensors(graphs.left), *graphs.outputs], [*state_tensors(left), *outputs])
