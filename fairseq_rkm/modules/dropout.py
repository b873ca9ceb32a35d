"""Dropouts that hold one mask for all steps of a sequence (Gal and Ghahramani 2016; Merity et al. 2018)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.constant_numbers import ConstantNumber, adopt_numbers


def check_probability(what: str, p: float) -> None:
    """Raise RKMError for a dropout probability outside [0, 1); ``what`` names it."""
    if not 0 <= p < 1:
        raise RKMError(f"{what} must lie within [0, 1), not be {p}")


class LockedDropout(nn.Module):
    """Zero the same features of a sequence at all its steps, and scale the rest by ``1 / (1 - p)``.

    Args:
        p: the probability of a zero, within [0, 1).
        name: its name in an error.

    Attributes:
        recorded: whether the last loaded state dict comes from a module that had this one.

    Raises:
        RKMError: ``p`` is outside its range.

    Example:
        >>> LockedDropout(0.5)(torch.ones(3, 1, 4))[:, 0]  # each column all zeros or all twos
    """

    p = ConstantNumber()

    def __init__(self, p: float, name: str = "dropout") -> None:
        super().__init__()
        check_probability(name, p)
        self.p = p
        self.recorded = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        adopt_numbers(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        self.recorded = "version" in local_metadata
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(T, B, d)``; the mask is ``(1, B, d)``."""
        if not self._drops or not x.size(0):
            return x
        return x * F.dropout(torch.ones_like(x[:1]), self.p)

    def mask(self, like: Tensor) -> Tensor | None:
        """What ``x`` is multiplied by, of the shape of ``like``, ``x[:1]``; drawn anew. None drops nothing."""
        return F.dropout(torch.ones_like(like), self.p) if self._drops else None

    @property
    def _drops(self) -> bool:
        return self.training and self.p != 0

    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropped_embedding(embedding: nn.Embedding, tokens: Tensor, p: float, training: bool) -> Tensor:
    """Look tokens up and drop whole words (Gal and Ghahramani 2016).

    Each word of the vocabulary is dropped or kept in the whole batch. Kept words are scaled by ``1 / (1 - p)``.

    Args:
        embedding: ``(V, e)``. Its weight, perhaps tied to an output layer, stays whole.
        tokens: int64, of any shape.
        p: the probability of a word's being dropped, within [0, 1).
        training: False looks the tokens up and drops none.

    Returns:
        The tokens' vectors, ``(*tokens.shape, e)``.
    """
    vectors: Tensor = embedding(tokens)
    if not training or p == 0:
        return vectors
    words = F.dropout(vectors.new_ones(embedding.num_embeddings), p)
    return vectors * words[tokens].unsqueeze(-1)
