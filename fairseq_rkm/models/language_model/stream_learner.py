"""``--dynamic-eval``: a language model learns each segment of a stream after it was scored."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_rkm.graphs import recording
from fairseq_rkm.models.language_model.segment_passes import Scored, SegmentPasses, States
from fairseq_rkm.modules.dynamic_evaluation import DynamicEvaluation
from fairseq_rkm.ops.segments import Reset

logger = logging.getLogger(__name__)

CHECKED = 100
"""On a GPU, segments between two looks at whether learning has diverged. Each look waits for the GPU."""


class StreamLearner:
    """Dynamic evaluation of a decoder.

    A segment's last target is the first token of the next segment. So a segment is learned when the next one comes. Of
    parallel streams, one that ends a segment before the others leaves its last target unlearned. Segment 0 begins a
    text, with the trained weights.

    On a GPU a diverged model may score up to :data:`CHECKED` segments more. Call :meth:`check` before scores are used.

    Args:
        decoder: with carried state and a plain softmax.
        numbers: learning rate, decay and epsilon of :class:`fairseq_rkm.modules.dynamic_evaluation.DynamicEvaluation`.
        training_segments: returns the training text's segments, batches of ``stateful_language_modeling``.
        record: as for :class:`~fairseq_rkm.models.language_model.segment_passes.SegmentPasses`.
    """

    def __init__(
        self,
        decoder: Any,
        numbers: tuple[float, float, float],
        training_segments: Callable[[], Iterable[dict]],
        record: Callable = recording.record,
    ) -> None:
        self.decoder, self.numbers, self.training_segments = decoder, numbers, training_segments
        self.record = record
        self.passes: Optional[SegmentPasses] = None
        self.segment = -1
        self.scored: Optional[tuple[Tensor, Callable[[Tensor], None]]] = None

    def score(self, segment: int, tokens: Tensor, states: Optional[States], reset: Optional[Reset]) -> Scored:
        """Learn the segment before this one, or begin a text; then score this one.

        Args:
            segment: this segment's number.
            tokens: its input, ``(B, T)`` int64.
            states: the states to start from; None for zeros.
            reset: where a sentence begins anew.

        Returns:
            Logits, features and states, without their graph.

        Raises:
            RKMError: a number is outside its range, the weights are in 16 bits, or learning has diverged.
        """
        scored, self.scored = self.scored, None
        if self.passes is None:
            self.passes = self._prepare(tokens.device)
        elif segment == 0:
            self.check()
            self.passes.dynamic.forget()
        elif scored is not None and segment == self.segment + 1:
            before, learn = scored
            learn(torch.cat([before[:, 1:], tokens[:, :1]], 1))
            if is_near(tokens.device) or segment % CHECKED == 0:
                self.check()
        now = self.passes.score(tokens, states, reset)
        self.segment, self.scored = segment, (tokens, now.learn)
        return now

    def check(self) -> None:
        """Wait for the device, and see whether learning has diverged since the text began.

        Raises:
            RKMError: it has.
        """
        if self.passes is not None:
            self.passes.dynamic.check()

    def _prepare(self, device: torch.device) -> SegmentPasses:
        """Take the statistics of the training text, with carried state."""
        dynamic = DynamicEvaluation(self.decoder.parameters(), *self.numbers)
        passes = SegmentPasses(self.decoder, dynamic, self.record)
        states, count = None, 0
        for batch in self.training_segments():
            tokens, target = batch["net_input"]["src_tokens"].to(device), batch["target"].to(device)
            states = passes.measure(tokens, target, states, self.decoder.resets(tokens))
            count += 1
        passes.dynamic.use_squares(count)
        logger.info(f"dynamic evaluation: gradients of {count:,} training segments are measured")
        return passes


def is_near(device: torch.device) -> bool:
    """Whether a look at a number there does not wait."""
    return device.type == "cpu"


class CheckedBatches:
    """Batches of a text for fairseq-eval-lm, and a look at the learning after the last.

    Args:
        batches: fairseq's iterator.
        learner: learns the text.
    """

    def __init__(self, batches: Any, learner: StreamLearner) -> None:
        self.batches, self.learner = batches, learner

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        """Give the batches.

        Raises:
            RKMError: learning has diverged.
        """
        yield from self.batches
        self.learner.check()
