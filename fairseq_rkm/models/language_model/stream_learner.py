"""``--dynamic-eval``: a language model learns each segment of a stream after it was scored."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.modules.dynamic_evaluation import DynamicEvaluation

logger = logging.getLogger(__name__)


class StreamLearner:
    """Dynamic evaluation of a decoder.

    A segment's last target is the first token of the next segment. So a segment is learned when the next one comes. Of
    parallel streams, one that ends a segment before the others leaves its last target unlearned. Segment 0 begins a
    text, with the trained weights.

    Args:
        decoder: with carried state and a plain softmax.
        numbers: learning rate, decay and epsilon of :class:`fairseq_rkm.modules.dynamic_evaluation.DynamicEvaluation`.
        training_segments: returns the training text's segments, batches of ``stateful_language_modeling``.
    """

    def __init__(
        self, decoder: Any, numbers: tuple[float, float, float], training_segments: Callable[[], Iterable[dict]]
    ) -> None:
        self.decoder, self.numbers, self.training_segments = decoder, numbers, training_segments
        self.dynamic: Optional[DynamicEvaluation] = None
        self.segment = -1
        self.scored: Optional[tuple[Tensor, Tensor]] = None

    def begin(self, segment: int, tokens: Tensor) -> None:
        """Learn the segment before this one, or begin a text.

        Args:
            segment: this segment's number.
            tokens: its input, ``(B, T)`` int64.

        Raises:
            RKMError: a number is outside its range, the weights are in 16 bits, or learning has diverged.
        """
        if self.dynamic is None:
            self.dynamic = DynamicEvaluation(self.decoder.parameters(), *self.numbers)
            self.dynamic.measure(self._training_losses(tokens.device))
        elif segment == 0:
            self.dynamic.forget()
        elif self.scored is not None and segment == self.segment + 1:
            before, logits = self.scored
            with torch.enable_grad():
                loss = self._loss(logits, torch.cat([before[:, 1:], tokens[:, :1]], 1))
            self.dynamic.learn(loss)
            self.dynamic.check()
        self.scored = None

    def scores(self, segment: int, tokens: Tensor, logits: Tensor) -> Tensor:
        """Keep a segment's logits ``(B, T, V)`` with their graph, and return them without it."""
        self.segment, self.scored = segment, (tokens, logits)
        return logits.detach()

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=self.decoder.padding_idx)

    def _training_losses(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the loss of each segment of the training text, with carried state."""
        states, count = None, 0
        for batch in self.training_segments():
            tokens, target = batch["net_input"]["src_tokens"].to(device), batch["target"].to(device)
            with torch.enable_grad():
                outputs, states = self.decoder.run(tokens, states, None, self.decoder.resets(tokens))
                loss = self._loss(self.decoder.output_layer(outputs.transpose(0, 1)), target)
            states = [state.detach() for state in states]
            yield loss
            count += 1
        logger.info(f"dynamic evaluation: gradients of {count:,} training segments are measured")
