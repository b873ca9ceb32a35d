"""The hypotheses of a beam search, followed back from their ends."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Choices(NamedTuple):
    """The choices of one step of a beam search, for B sentences of K beams each.

    Attributes:
        tokens: ``(B, K)`` int64, the token that each beam of the next step starts with.
        scores: ``(B, K)`` float32, the log-probability of each beam of the next step.
        parents: ``(B, K)`` int64, the beam of this step that each beam of the next one continues.
        ended: ``(B, K)`` bool, whether the candidate of each rank ends a hypothesis.
        ended_scores: ``(B, K)`` float32, the log-probability of each ended hypothesis.
        ended_parents: ``(B, K)`` int64, the beam of this step that each ended hypothesis came from.
        attention: ``(B, K, S)``, the attention weights of this step's beams.
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
    """The first K hypotheses of each sentence to end, the best first, in fairseq's form.

    Args:
        steps: the choices of all steps of a search, in order.
        eos: the symbol that ends a hypothesis.
        normalize: divide a hypothesis' score by its length to the power of ``length_penalty``.
        length_penalty: the power.

    Returns:
        A list for each sentence, with a dictionary for each hypothesis: ``tokens``, ``(T,)`` int64; ``score``;
        ``positional_scores``, ``(T,)``; ``attention``, ``(S, T)``; ``alignment``, empty. T counts the end symbol. A
        sentence without an ended hypothesis has an empty list.
    """
    *decisions, looked = (torch.stack(values) for values in zip(*steps, strict=True))
    tokens, scores, parents, ended, ended_scores, ended_parents = (values.cpu().numpy() for values in decisions)
    ends = _find_ends(ended, ended_scores, ended_parents, normalize, length_penalty)
    words, sums, path = _walk(tokens, scores, parents, ends, eos)

    # All hypotheses stand one after another and are cut apart below.
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
    """The ends of N hypotheses as arrays ``(N,)``, sentence by sentence, the best of each first."""

    sentence: np.ndarray
    step: np.ndarray
    beam: np.ndarray
    total: np.ndarray
    score: np.ndarray


def _find_ends(
    ended: np.ndarray, scores: np.ndarray, parents: np.ndarray, normalize: bool, length_penalty: float
) -> _Ends:
    """The first K ends of each sentence, from arrays ``(steps, B, K)``."""
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
    """The token, the log-probability so far and the beam of each hypothesis at each step, ``(steps, N)`` each."""
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
