"""The scores of a vocabulary's words, as products that are fast for any number of words.

:mod:`fairseq_rkm.ops.alignment` says how much a GPU loses with rows that end anywhere. Here the weight is copied, which
is small. The scores are born aligned, and so are their gradients: neither is copied.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F

ALIGNED_WORDS = 16
"""Rows of a multiple of so many numbers are aligned for products in all dtypes, and Triton takes note of it."""


def word_logits(words: nn.Linear, features: Tensor) -> Tensor:
    """Return ``words(features)``; on a GPU with columns of -inf after the last word's, up to aligned rows.

    A softmax over all columns has probability 0, and a gradient of 0, in those of -inf.

    Args:
        words: from features to V logits.
        features: ``(..., d)``.

    Returns:
        ``(..., V')``, with V' from V to V + 15.
    """
    padding = -words.out_features % ALIGNED_WORDS
    # Another class, or a hook, does more than a product.
    plain = type(words) is nn.Linear and not (words._forward_hooks or words._forward_pre_hooks)
    return padded_logits(words, features, padding) if padding and plain and features.is_cuda else words(features)


def padded_logits(words: nn.Linear, features: Tensor, padding: int) -> Tensor:
    """Return ``words(features)`` and so many columns of -inf: ``(..., V + padding)``."""
    bias = words.weight.new_zeros(words.out_features) if words.bias is None else words.bias
    return F.linear(features, F.pad(words.weight, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=-math.inf))
