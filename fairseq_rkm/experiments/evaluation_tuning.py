"""Choose numbers of a language model's evaluation on the validation set: one pass scores all candidates."""

import abc
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import fairseq_rkm
from fairseq_rkm.experiments.scored_stream import open_stream
from fairseq_rkm.modules.continuous_cache import CacheMemory, ContinuousCache, cache_probabilities

MOST_LINES = 5
"""Lines that the table shows, the best candidates first."""


class Scored(NamedTuple):
    """A segment of the stream, and the model's answer.

    Attributes:
        tokens: the input, ``(1, T)`` int64.
        target: the words to predict, of the same shape.
        logits: the model's, ``(1, T, V)``.
        outputs: its last layer's, ``(1, T, d)``.
    """

    tokens: Tensor
    target: Tensor
    logits: Tensor
    outputs: Tensor

    def of_targets(self, values: Tensor) -> Tensor:
        """The targets' values, ``(1, T)`` float64, of values for all words, ``(1, T, V)``."""
        return values.gather(2, self.target.unsqueeze(-1)).squeeze(-1).double()


class Recalled(NamedTuple):
    """The words of a continuous cache in reach of a segment's positions; ``J`` of them are held.

    Attributes:
        likeness: of each output and each cached one, ``(1, T, J)``; minus infinity out of reach.
        hits: where the cached word is the target, of the same shape.
    """

    likeness: Tensor
    hits: Tensor

    def mixed(self, model: Tensor, theta: float, weights: Sequence[float]) -> list[Tensor]:
        """The logarithms of the targets' probabilities in the mixture with the cache, for each weight.

        Args:
            model: the model's probabilities, ``(..., T)`` float64.
            theta: how sharply likeness counts.
            weights: lambda.
        """
        found = (cache_probabilities(self.likeness, theta) * self.hits).sum(-1).double()
        reached = self.likeness.isfinite().any(-1).double()
        return [torch.lerp(model, found, weight * reached).log() for weight in weights]


class StreamCache:
    """A continuous cache whose memory goes from segment to segment."""

    def __init__(self, size: int, theta: float = 1.0, weight: float = 0.0) -> None:
        self.cache = ContinuousCache(size, theta, weight)
        self._memory: CacheMemory | None = None

    def recall(self, segment: Scored) -> Recalled:
        """The cache's words for the next segment."""
        likeness, words, self._memory = self.cache.recall(segment.outputs, segment.tokens, self._memory)
        return Recalled(likeness, words.unsqueeze(1) == segment.target.unsqueeze(-1))

    def flags(self, theta: float, weight: float) -> str:
        """fairseq-eval-lm's flags for this cache with these numbers."""
        return f"--cache-size {self.cache.size} --cache-theta {theta} --cache-lambda {weight}"


class Tuning(abc.ABC):
    """The numbers to choose, and how candidates score; a script's command line makes one.

    Attributes:
        program: the script's name, which begins its errors.
        columns: the names of a candidate's numbers.
        candidates: all that are tried.
    """

    program: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    candidates: ClassVar[Sequence[tuple[float, ...]]]

    @staticmethod
    @abc.abstractmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the script's own flags."""

    @abc.abstractmethod
    def __init__(self, args: argparse.Namespace) -> None: ...

    @abc.abstractmethod
    def score(self, segment: Scored) -> Tensor:
        """The logarithm of the segment's probability for each candidate, ``(candidates,)`` float64.

        Segments come in the stream's order, each once.
        """

    @abc.abstractmethod
    def flags(self, numbers: tuple[float, ...]) -> str:
        """The flags by which fairseq-eval-lm takes a candidate's numbers."""


def tune(tuning: type[Tuning], explanation: str | None) -> None:
    """Run a script's command line: score the candidates on a split, print the best, and the flags to evaluate with.

    A user's mistake ends it with one sentence.
    """
    parser = argparse.ArgumentParser(description=explanation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="binarized data")
    parser.add_argument("checkpoint", type=Path, help="a trained rkm_lm")
    parser.add_argument("--split", default="valid", help="what to choose on")
    tuning.add_flags(parser)
    args = parser.parse_args()
    try:
        chosen = tuning(args)
        found = perplexities(chosen, *open_stream(args.data, args.checkpoint, args.split))
    except fairseq_rkm.RKMError as error:
        sys.exit(f"{tuning.program}: {error}")
    best = sorted(found, key=found.__getitem__)
    print("  ".join([*tuning.columns, "perplexity"]))
    for numbers in best[:MOST_LINES]:
        columns = [f"{number:{len(name)}}" for name, number in zip(tuning.columns, numbers, strict=True)]
        print("  ".join([*columns, f"{found[numbers]:10.2f}"]))
    print(chosen.flags(best[0]))


@torch.no_grad()
def perplexities(tuning: Tuning, decoder: Any, segments: Any, device: torch.device) -> dict[tuple[float, ...], float]:
    """The perplexity of one stream for each candidate.

    Args:
        tuning: scores the segments.
        decoder: a language model's, in evaluation mode.
        segments: of the stream (:class:`fairseq_rkm.data.token_stream.StreamSegments`).
        device: the decoder's.
    """
    total, count = torch.zeros(len(tuning.candidates), dtype=torch.float64, device=device), 0
    for i in range(len(segments)):
        tokens = segments[i]["net_input"]["src_tokens"].to(device)
        target = segments[i]["target"].to(device)
        logits, extra = decoder(tokens, segment=i)
        total -= tuning.score(Scored(tokens, target, logits, extra["features"].transpose(0, 1)))
        count += target.numel()
        print(f"\r  {100 * (i + 1) // len(segments)}%", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {numbers: math.exp(sum_ / count) for numbers, sum_ in zip(tuning.candidates, total.tolist(), strict=True)}
