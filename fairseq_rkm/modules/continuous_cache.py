"""The continuous cache of Grave, Joulin and Usunier (2017), *Improving Neural Language Models with a Continuous Cache*.

A trained model's recent outputs, each with the word that followed it, are a second predictor: words that followed
outputs like the present one are likely. Nothing is trained.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError


class CacheMemory(NamedTuple):
    """What a segment leaves for the next one.

    Attributes:
        keys: the last outputs, ``(B, K, d)``, K at most the cache's size, oldest first.
        words: the words that followed all but the last of them, ``(B, K - 1)`` int64.
    """

    keys: Tensor
    words: Tensor


class ContinuousCache:
    """``p(w) = (1 - lambda) p_model(w) + lambda p_cache(w)``, p_cache as :func:`cache_probabilities` has it.

    Args:
        size: outputs that the cache holds.
        theta: how sharply likeness counts; 0 or more.
        weight: lambda, within [0, 1): with 1 a word that the cache has not would be impossible.

    Raises:
        RKMError: a value outside its range.
    """

    def __init__(self, size: int, theta: float, weight: float) -> None:
        if size < 1:
            raise RKMError(f"--cache-size must be 0 (no cache) or more, not {size}")
        if not 0 <= theta < math.inf:
            raise RKMError(f"--cache-theta must be 0 or more, not {theta}")
        if not 0 <= weight < 1:
            raise RKMError(
                f"--cache-lambda must lie within [0, 1), not be {weight}: words outside the cache need the model"
            )
        self.size, self.theta, self.weight = size, theta, weight

    def log_probabilities(
        self, logits: Tensor, outputs: Tensor, tokens: Tensor, memory: CacheMemory | None
    ) -> tuple[Tensor, CacheMemory]:
        """The mixture for one segment of parallel streams.

        Args:
            logits: the model's, ``(B, T, V)``.
            outputs: its last layer's, ``(B, T, d)``.
            tokens: its input, ``(B, T)`` int64.
            memory: what the segment before left; None at a stream's start.

        Returns:
            ``(B, T, V)`` float32 logarithms, and what this segment leaves. Where the cache is empty, at a stream's
            first position, the model stands alone.
        """
        likeness, words, left = self.recall(outputs, tokens, memory)
        # As logarithms throughout: a probability below 1e-45 must not become 0.
        model = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        cache = torch.zeros_like(model)
        cache.scatter_add_(2, words.unsqueeze(1).expand_as(likeness), cache_probabilities(likeness, self.theta))
        weight = self.weight * likeness.isfinite().any(-1, keepdim=True).to(model.dtype)
        return torch.logaddexp(model + torch.log1p(-weight), (cache * weight).log()), left

    def recall(self, outputs: Tensor, tokens: Tensor, memory: CacheMemory | None) -> tuple[Tensor, Tensor, CacheMemory]:
        """The outputs in reach of each position.

        Args and the last of the returned values are as in :meth:`log_probabilities`.

        Returns:
            likeness: the dot product of each output with each in the cache, ``(B, T, J)`` float32, minus infinity where
                that is out of reach: not before the position, or more than ``size`` before.
            words: the word that followed each in the cache, ``(B, J)``.
            memory: what this segment leaves.
        """
        outputs = outputs.float()
        # Each input is the word that followed the output before it; a stream's first input followed none.
        keys = outputs if memory is None else torch.cat([memory.keys, outputs], 1)
        words = tokens[:, 1:] if memory is None else torch.cat([memory.words, tokens], 1)
        steps, held = outputs.size(1), keys.size(1) - outputs.size(1)
        likeness = outputs @ keys[:, :-1].transpose(1, 2)
        position = held + torch.arange(steps, device=keys.device).unsqueeze(1)
        distance = position - torch.arange(keys.size(1) - 1, device=keys.device)
        likeness = likeness.masked_fill((distance < 1) | (distance > self.size), -math.inf)
        last = keys[:, -self.size :]
        return likeness, words, CacheMemory(last, words[:, words.size(1) - last.size(1) + 1 :])


def cache_probabilities(likeness: Tensor, theta: float) -> Tensor:
    """``softmax(theta * likeness)`` over the last dimension; zeros where nothing is in reach."""
    return F.softmax(theta * likeness, dim=-1).nan_to_num(0.0) if likeness.size(-1) else likeness
