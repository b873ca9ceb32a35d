"""What a beam search has found, followed back from where each hypothesis ends."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Choices(NamedTuple):
    """What one step of a beam search chose, for B sentences of K beams each.

    Attributes:
        tokens: ``(B, K)`` int64, the tokens with which the next step's beams continue.
        scores: ``(B, K)`` float32, those beams' log-probabilities.
        parents: ``(B, K)`` int64, this step's beams that they continue.
        ended: ``(B, K)`` bool, whether the candidate of this rank is the end of a hypothesis.
        ended_scores: ``(B, K)`` float32, such hypotheses' log-probabilities.
        ended_parents: ``(B, K)`` int64, this step's beams that they end.
        attention: ``(B, K, S)``, where this step's beams looked.
    """

    tokens: Tensor
    scores: Tensor
    parents: Tensor
    ended: Tensor
    ended_scores: Tensor
    ended_parents: Tensor
    attention: Tensor


def follow_back(
    steps: Sequence[Choices], eos: int, normalize: bool = True, length_penalty: float = 1.0
) -> list[list[dict[str, Tensor]]]:
    """The hypotheses of each sentence, the first K that ended and of these the best first, as fairseq has them.

    Args:
        steps: of a search, each as of one step.
        eos: the symbol with which hypotheses end.
        normalize: divide a hypothesis' score by its length to the power of ``length_penalty``.
        length_penalty: that power.

    Returns:
        For each sentence a list of ``tokens`` ``(T,)`` int64, ``score``, ``positional_scores`` ``(T,)``, ``attention``
        ``(S, T)``, and ``alignment``, which is empty; T with the symbol for the end. A sentence none of whose
        hypotheses has ended has an empty list.
    """
    *decisions, looked = (torch.stack(values) for values in zip(*steps, strict=True))
    tokens, scores, parents, ended, ended_scores, ended_parents = (values.cpu().numpy() for values in decisions)
    ends = _find_ends(ended, ended_scores, ended_parents, normalize, length_penalty)
    words, sums, path = _walk(tokens, scores, parents, ends, eos)

    # All hypotheses one after another, to be cut into pieces.
    lengths = ends.step + 1
    number = np.repeat(np.arange(len(lengths)), lengths)
    step = np.arange(len(number)) - np.repeat(lengths.cumsum() - lengths, lengths)
    alone = sums[step, number] - np.where(step > 0, sums[step - 1, number], 0)
    places = step, ends.sentence[number], path[step, number]
    attention = looked[tuple(_beside(looked, place) for place in places)].float().t()

    pieces, none = lengths.tolist(), torch.empty(0)
    columns = zip(
        _beside(looked, words[step, number]).split(pieces),
        _beside(looked, ends.score).unbind(),
        attention.split(pieces, dim=1),
        _beside(looked, alone).split(pieces),
        strict=True,
    )
    hypotheses: list[list[dict[str, Tensor]]] = [[] for _ in range(looked.size(1))]
    for sentence, (word, score, weights, share) in zip(ends.sentence.tolist(), columns, strict=True):
        hypotheses[sentence].append(
            {"tokens": word, "score": score, "attention": weights, "alignment": none, "positional_scores": share}
        )
    return hypotheses


class _Ends(NamedTuple):
    """Of N hypotheses, sentence by sentence and the best of each first: arrays ``(N,)``."""

    sentence: np.ndarray
    step: np.ndarray
    beam: np.ndarray
    total: np.ndarray
    score: np.ndarray


def _find_ends(
    ended: np.ndarray, scores: np.ndarray, parents: np.ndarray, normalize: bool, length_penalty: float
) -> _Ends:
    """The first K of each sentence, from arrays ``(steps, B, K)``."""
    count, sentences, beams = ended.shape
    in_turn = ended.transpose(1, 0, 2).reshape(sentences, count * beams)
    sentence, place = (in_turn & (in_turn.cumsum(axis=1) <= beams)).nonzero()
    step, rank = np.divmod(place, beams)
    total = score = scores[step, sentence, rank]
    if normalize:
        score = total / ((step + 1.0) ** length_penalty).astype(total.dtype)
    best_first = np.lexsort((-score, sentence))
    values = sentence, step, parents[step, sentence, rank], total, score
    return _Ends(*(value[best_first] for value in values))


def _walk(
    tokens: np.ndarray, scores: np.ndarray, parents: np.ndarray, ends: _Ends, eos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each hypothesis' token, log-probability up to it, and beam at each step: ``(steps, N)``, to its end."""
    shape = len(tokens), len(ends.step)
    words, sums, path = np.empty(shape, tokens.dtype), np.empty(shape, scores.dtype), np.empty(shape, parents.dtype)
    beam = ends.beam
    for step in reversed(range(len(tokens))):
        inside = step < ends.step
        words[step] = np.where(inside, tokens[step, ends.sentence, beam], eos)
        sums[step] = np.where(inside, scores[step, ends.sentence, beam], ends.total)
        path[step] = beam = np.where(inside, parents[step, ends.sentence, beam], beam)
    return words, sums, path


def _beside(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(like.device)
