"""Attention over a source's states."""

import torch
from torch import Tensor, nn


class GlobalAttention(nn.Module):
    """Luong et al. (2015): global attention with the "general" score, and the attentional vector made from it.

    For a query q and source states s_1 .. s_S: weights ``softmax_j(q^T W_a s_j)``, context ``c = sum_j weight_j s_j``,
    and ``tanh(W_c [c; q])``, their equations 5, 7 and 8. It takes the queries of all of a target's steps at once.

    Args:
        query_size: d.
        source_size: e.
        output_size: of the attentional vector.
    """

    def __init__(self, query_size: int, source_size: int, output_size: int) -> None:
        super().__init__()
        self.score = nn.Linear(query_size, source_size, bias=False)
        self.combine = nn.Linear(source_size + query_size, output_size, bias=False)

    def forward(self, query: Tensor, source: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``(T, B, d)``.
            source: ``(S, B, e)``. Or of ``B / K`` sentences, each that of K rows of the query which follow each other:
                of its beams.
            padding_mask: ``(B, S)`` or ``(B / K, S)`` bool, True at the source's padding, which gets no weight
                and is not read.

        Returns:
            The attentional vectors, ``(T, B, output_size)``, and the weights, ``(B, T, S)``; both of the query's dtype,
            the softmax computed in float32 or better.
        """
        # Filled, since a weight of zero does not make zero of a number that is missing.
        source = source.transpose(0, 1).masked_fill(padding_mask.unsqueeze(-1), 0)
        steps, sentences = query.size(0), source.size(0)
        # A sentence is asked by each step of each of its beams.
        asked = self.score(query).view(steps, sentences, -1, source.size(2)).transpose(0, 1).flatten(1, 2)
        scores = torch.bmm(asked, source.transpose(1, 2))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(padding_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).to(source.dtype)
        context = torch.bmm(weights, source).view(sentences, steps, -1, source.size(2)).transpose(0, 1).flatten(1, 2)
        weights = weights.view(sentences, steps, -1, source.size(1)).transpose(1, 2).flatten(0, 1)
        return torch.tanh(self.combine(torch.cat([context, query], dim=-1))), weights
