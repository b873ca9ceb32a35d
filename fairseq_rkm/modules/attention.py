"""Attention over the states of a source sentence."""

import torch
from torch import Tensor, nn


class GlobalAttention(nn.Module):
    """Global attention with the "general" score of Luong et al. (2015), their equations 5, 7 and 8.

    A query q weighs the source states s_1 .. s_S by ``softmax_j(q^T W_a s_j)``. The context is
    ``c = sum_j weight_j s_j``, and the attentional vector ``tanh(W_c [c; q])``. One call takes all steps' queries.

    Args:
        query_size: d, the features of a query.
        source_size: e, the features of a source state.
        output_size: the features of the attentional vector.

    Example:
        >>> attend = GlobalAttention(512, 512, 256)
        >>> padding = torch.zeros(4, 9, dtype=torch.bool)
        >>> vectors, weights = attend(torch.randn(7, 4, 512), torch.randn(9, 4, 512), padding)  # (7, 4, 256), (4, 7, 9)
    """

    def __init__(self, query_size: int, source_size: int, output_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(query_size, source_size, bias=False)
        self.combine = nn.Linear(source_size + query_size, output_size, bias=False)

    def forward(self, query: Tensor, source: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``(T, B, d)``.
            source: ``(S, B, e)``, or ``(S, B / K, e)`` for beams of K: a sentence then serves K consecutive rows of the
                query.
            padding_mask: ``(B, S)`` or ``(B / K, S)`` bool, True at the source's padding. Padding gets no weight and is
                not read.

        Returns:
            The attentional vectors, ``(T, B, output_size)``, and the weights, ``(B, T, S)``. Both have the query's
            dtype; the softmax runs in float32 or better.
        """
        # A weight of zero times NaN is NaN: padding is filled first.
        source = source.transpose(0, 1).masked_fill(padding_mask.unsqueeze(-1), 0)
        steps, sentences = query.size(0), source.size(0)
        # Each step of each beam asks its sentence.
        asked = self.score(query).view(steps, sentences, -1, source.size(2)).transpose(0, 1).flatten(1, 2)
        scores = torch.bmm(asked, source.transpose(1, 2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(padding_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).to(source.dtype)
        context = torch.bmm(weights, source).view(sentences, steps, -1, source.size(2)).transpose(0, 1).flatten(1, 2)
        weights = weights.view(sentences, steps, -1, source.size(1)).transpose(1, 2).flatten(0, 1)
        return torch.tanh(self.combine(torch.cat([context, query], dim=-1))), weights
