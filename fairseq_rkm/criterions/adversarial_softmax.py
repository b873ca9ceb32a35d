"""Adversarial noise on the softmax.

Wang, Gong and Liu (2019), *Improving Neural Language Modeling via Adversarial Training*. The target's output embedding
w is moved within a ball of radius ``size * |w|`` to where the target is least likely. This is against the output h: the
target's score becomes ``w h - size * |w| * |h|``. The ball's radius is taken for a constant, so that the noise does not
shrink the embeddings.
"""

import torch
from torch import Tensor

ALMOST_CERTAIN = -(2.0**-24)
"""The logarithm of the largest probability below 1 in float32."""


def cost_of_noise(target_log_probs: Tensor, outputs: Tensor, embeddings: Tensor, size: float) -> Tensor:
    """Return how much each target's cross entropy grows by the noise, ``(N,)``, in nats; never below 0.

    A score that falls by m takes a target of probability p to ``p e^-m / (1 - p + p e^-m)``. So neither the noise nor
    a second softmax has to be made.

    Args:
        target_log_probs: the targets' log probabilities without noise, ``(N,)``, of at least float32.
        outputs: h, ``(N, d)``.
        embeddings: w, the targets' output embeddings, ``(N, d)``.
        size: the radius of the ball, as a share of the embedding's norm.
    """
    dtype = target_log_probs.dtype
    margin = size * embeddings.detach().to(dtype).norm(dim=-1) * outputs.to(dtype).norm(dim=-1)
    # The logarithm of 1 - p has no gradient at p = 1.
    log_probs = target_log_probs.clamp(max=ALMOST_CERTAIN)
    others = torch.log(-torch.expm1(log_probs))
    return margin + torch.logaddexp(others, log_probs - margin)
