"""One vector for a whole sequence."""

import torch
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError

POOLINGS = ("mean", "max", "last")
LEAST_POWER = 1e-6
"""Added to a mean square before its logarithm, which silence would make infinite."""


def pool(kind: str, output: Tensor, hidden: Tensor, padding_mask: Tensor) -> Tensor:
    """Reduce a recurrence's outputs to one vector a sequence; padding has no part in it.

    Args:
        kind: ``"mean"`` or ``"max"`` over the real steps, or ``"last"`` for each direction's final state.
        output: ``(T, B, d * directions)``, the last layer's.
        hidden: ``(layers * directions, B, d)``, the final hidden state.
        padding_mask: ``(B, T)`` bool, True at padding.

    Returns:
        ``(B, d * directions)`` of the output's dtype; zeros for a sequence without real steps.

    Raises:
        RKMError: an unknown kind.

    Example:
        >>> padding = torch.arange(9) >= torch.tensor([[9], [5]])  # two documents, of 9 and 5 words
        >>> output, state = RKM(50, 64, bidirectional=True)(torch.randn(9, 2, 50), padding_mask=padding)
        >>> pool("mean", output, state.hidden, padding)  # (2, 128)
    """
    if kind == "last":
        directions = output.size(2) // hidden.size(2)
        return hidden[-directions:].transpose(0, 1).flatten(1)
    padding = padding_mask.t().unsqueeze(-1)
    if kind == "mean":
        # Sums over thousands of steps overflow 16 bits.
        total = output.masked_fill(padding, 0).sum(0, dtype=_accumulator(output.dtype))
        return (total / (~padding).sum(0).clamp(min=1)).to(output.dtype)
    if kind == "max":
        return output.masked_fill(padding, -torch.inf).amax(0).masked_fill(padding.all(0), 0)
    raise RKMError(f"unknown pooling {kind!r}; choose one of {', '.join(POOLINGS)}")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def log_power(output: Tensor, padding_mask: Tensor) -> Tensor:
    """The logarithm of each feature's variance over a sequence's real steps: the power of a filter's output.

    Args:
        output: ``(T, B, size)``.
        padding_mask: ``(B, T)`` bool, True at padding.

    Returns:
        ``(B, size)`` of the output's dtype.
    """
    padding = padding_mask.t().unsqueeze(-1)
    count = (~padding).sum(0).clamp(min=1)
    real = output.to(_accumulator(output.dtype)).masked_fill(padding, 0)
    centred = (real - real.sum(0) / count).masked_fill(padding, 0)
    return (centred.square().sum(0) / count + LEAST_POWER).log().to(output.dtype)


def outside_parts(padding_mask: Tensor, parts: int) -> list[Tensor]:
    """Divide each sequence's real steps into equal parts, one after the other.

    >>> [mask.tolist() for mask in outside_parts(torch.tensor([[False, False, False, True]]), 2)]
    [[[False, False, True, True]], [[True, True, False, True]]]

    Args:
        padding_mask: ``(B, T)`` bool, True at padding, on either side.
        parts: their number. Where there are fewer steps than parts, some parts are empty.

    Returns:
        For each part a mask as ``padding_mask``, True at padding and at the steps of other parts.
    """
    real = ~padding_mask
    position, length = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    part = position * parts // length.clamp(min=1)
    return [padding_mask | (part != number) for number in range(parts)]


class AttentionPooling(nn.Module):
    """Reduce outputs to their mean under learned weights, which sum to 1 over a sequence's real steps.

    Args:
        size: the size of an output.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.score = nn.Linear(size, 1, bias=False)

    def forward(self, output: Tensor, padding_mask: Tensor) -> Tensor:
        """``output``: ``(T, B, size)``; ``padding_mask``: ``(B, T)`` bool.

        Returns:
            ``(B, size)`` of the output's dtype; zeros for a sequence without real steps.
        """
        padding = padding_mask.t()
        scores = self.score(output).squeeze(-1).to(_accumulator(output.dtype))
        # A row of padding alone would be NaN: its scores are left as they are, and its outputs are zero.
        shares = scores.masked_fill(padding & ~padding.all(0), -torch.inf).softmax(0)
        kept = output.masked_fill(padding.unsqueeze(-1), 0)
        return (shares.unsqueeze(-1) * kept).sum(0).to(output.dtype)
