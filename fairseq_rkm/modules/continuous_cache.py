"""The continuous cache of Grave, Joulin and Usunier (2017), *Improving Neural Language Models with a Continuous Cache*.

A second predictor stands beside the trained model. It keeps the model's recent outputs, each with the word that
followed. A word is likely if it followed an output like the present one. Nothing is trained.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError


class CacheMemory(NamedTuple):
    """The cache's content at the end of a segment; the next segment starts with it.

    Attributes:
        keys: the last outputs, ``(B, K, d)`` float32, K at most the cache's size, oldest first.
        words: the words that followed all but the last output, ``(B, K - 1)`` int64.
    """

    keys: Tensor
    words: Tensor


class ContinuousCache:
    """The mixture ``p(w) = (1 - lambda) p_model(w) + lambda p_cache(w)``, with :func:`cache_probabilities`.

    Args:
        size: the number of outputs that the cache holds.
        theta: how sharply likeness counts; 0 or more.
        weight: lambda, within [0, 1). With 1, words outside the cache would be impossible.

    Raises:
        RKMError: a value outside its range.

    Example:
        >>> cache, memory = ContinuousCache(500, theta=0.3, weight=0.1), None
        >>> log_p, memory = cache.log_probabilities(logits, outputs, tokens, memory)  # for each segment of a stream
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
            memory: the memory that the last segment returned; None at a stream's start.

        Returns:
            The logarithms, ``(B, T, V)`` float32, and the memory for the next segment. At a stream's first position the
            cache is empty, and the model stands alone.
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

        Arguments are as in :meth:`log_probabilities`.

        Returns:
            likeness: the dot product of each output with each cached one, ``(B, T, J)`` float32. It is minus infinity
                out of reach: at or after the position, or more than ``size`` before it.
            words: the word that followed each cached output, ``(B, J)`` int64.
            memory: the memory for the next segment.
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
    """``softmax(theta * likeness)`` over the last dimension, of the same shape; zeros where nothing is in reach."""
    return F.softmax(theta * likeness, dim=-1).nan_to_num(0.0) if likeness.size(-1) else likeness
