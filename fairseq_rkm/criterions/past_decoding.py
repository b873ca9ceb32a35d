"""Past decode regularisation (Brahma 2018, *Improved Language Modeling by Decoding the Past*, arXiv:1808.05908).

The distribution that a model predicts for the next word is to tell the word that was read last.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm.criterions.word_costs import word_costs


class PastDecoder(nn.Module):
    """Decode the last input word from the predicted distribution.

    The distribution p over V words has a mean embedding, ``E^T p``. The scores of the words that may have come before
    are ``E (E^T p) + b``, with a bias of their own and no temperature. Both embeddings are the model's.

    Args:
        words: V, the vocabulary's size.

    Attributes:
        bias: b, ``(V,)``, from 0.
    """

    def __init__(self, words: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, predicted: Tensor, embedding: Tensor, words: Tensor) -> Tensor:
        """Return the cross entropy of each input word, ``(N,)`` of at least float32, in nats.

        Args:
            predicted: the model's distributions, ``(N, V')``; columns from V on hold zeros.
            embedding: E, ``(V, e)``.
            words: the input words after which they were made, ``(N,)`` int64.
        """
        padding = predicted.size(1) - len(embedding)
        bias: Tensor = self.bias
        if padding:
            embedding, bias = F.pad(embedding, (0, 0, 0, padding)), F.pad(bias, (0, padding), value=-math.inf)
        mean = predicted.to(embedding.dtype) @ embedding
        return word_costs(F.linear(mean, embedding, bias), words)[0]
