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
    count, sentences, beams = ended.shape
    ends = ended.transpose(1, 0, 2).reshape(sentences, count * beams)
    sentence, place = (ends & (ends.cumsum(axis=1) <= beams)).nonzero()
    last, rank = np.divmod(place, beams)
    total = ended_scores[last, sentence, rank]
    score = total / ((last + 1.0) ** length_penalty).astype(total.dtype) if normalize else total
    best_first = np.lexsort((-score, sentence))
    sentence, last, rank, total, score = (values[best_first] for values in (sentence, last, rank, total, score))

    # From the last step to the first: each hypothesis' token, log-probability up to it, and beam.
    words, sums, path = np.full((count, len(last)), eos), np.tile(total, (count, 1)), np.zeros((count, len(last)), int)
    beam = ended_parents[last, sentence, rank]
    for step in reversed(range(count)):
        inside = step < last
        words[step] = np.where(inside, tokens[step, sentence, beam], eos)
        sums[step] = np.where(inside, scores[step, sentence, beam], total)
        path[step] = beam = np.where(inside, parents[step, sentence, beam], beam)

    # One hypothesis after another.
    lengths = last + 1
    number = np.repeat(np.arange(len(lengths)), lengths)
    step = np.arange(len(number)) - np.repeat(lengths.cumsum() - lengths, lengths)
    before = np.where(step > 0, sums[step - 1, number], 0)
    attention = looked[tuple(_on(looked, index) for index in (step, sentence[number], path[step, number]))]
    pieces = lengths.tolist()
    found = zip(
        _on(looked, words[step, number]).split(pieces),
        _on(looked, score).unbind(),
        attention.float().t().split(pieces, dim=1),
        _on(looked, sums[step, number] - before).split(pieces),
        strict=True,
    )
    names = "tokens", "score", "attention", "positional_scores"
    hypotheses: list[list[dict[str, Tensor]]] = [[] for _ in range(sentences)]
    for index, values in zip(sentence.tolist(), found, strict=True):
        hypotheses[index].append({**dict(zip(names, values, strict=True)), "alignment": torch.empty(0)})
    return hypotheses


def _on(like: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).to(like.device)
