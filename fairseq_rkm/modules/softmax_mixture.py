"""A mixture of softmaxes: Yang, Dai, Salakhutdinov and Cohen (2018), *Breaking the Softmax Bottleneck*.

The logits of one softmax over V words are products of vectors of the embedding's size e: as a matrix of contexts by
words they have rank e at most. The logarithm of a mixture has no such bound.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm.modules.dropout import LockedDropout
from fairseq_rkm.modules.word_logits import word_logits


class SoftmaxMixture(nn.Module):
    """``p(word) = sum_k pi_k softmax(E tanh(W_k h + b_k) + b)[word]``, with ``pi = softmax(V h)``.

    E and b are those of a linear layer from e numbers to words. A training step keeps K times the logits of a plain
    softmax, in float32.

    Args:
        features: d, the size of h.
        size: e.
        number: K, the softmaxes.
        dropout: on ``tanh(W_k h + b_k)``, one mask for all steps.

    Raises:
        RKMError: ``dropout`` is outside [0, 1).

    Example:
        >>> SoftmaxMixture(6, 4, 3, 0.1)(torch.randn(2, 5, 6), torch.nn.Linear(4, 9)).shape
        torch.Size([2, 5, 9])
    """

    def __init__(self, features: int, size: int, number: int, dropout: float) -> None:
        super().__init__()
        self.number = number
        self.prior = nn.Linear(features, number, bias=False)
        self.latent = nn.Linear(features, number * size)
        self.dropout = LockedDropout(dropout, "--dropout-latent")

    def forward(self, features: Tensor, words: nn.Linear) -> Tensor:
        """Return log probabilities, ``(B, T, V)``, of at least float32.

        A softmax of them is the same distribution: they stand where logits are expected.

        Args:
            features: h, ``(B, T, d)``.
            words: from e numbers to V logits.
        """
        latent = torch.tanh(self.latent(features))
        latent = self.dropout(latent.transpose(0, 1)).transpose(0, 1)
        logits = word_logits(words, latent.unflatten(-1, (self.number, -1)))[..., : words.out_features]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide)
        # log pi_k and the logarithm of each softmax's sum first, which are small: then one sum over K.
        shift = F.log_softmax(self.prior(features), -1, dtype=wide) - logits.logsumexp(-1)
        return (logits + shift.unsqueeze(-1)).logsumexp(-2)
