"""The encoder of ``rkm``: an embedding and a stack of RKM layers in one direction or both."""

from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoder
from fairseq.modules import FairseqDropout
from torch import Tensor, nn

from fairseq_rkm.data.dictionary import FINGERPRINT, check_fingerprint, fingerprint
from fairseq_rkm.models.recurrence_options import NO_LIMIT, build_rkm, first_given
from fairseq_rkm.models.word_layers import WORD_DEVIATION
from fairseq_rkm.modules import dropped_embedding

EncoderOut = dict[str, list[Tensor]]
"""The result of :meth:`RKMEncoder.forward`: lists of tensors, as fairseq's generators need them.

``encoder_out``: one tensor ``(S, B, e)``; ``encoder_padding_mask``: one ``(B, S)`` bool, True at padding;
``encoder_hiddens`` and ``encoder_memories``: one ``(layers, B, e)`` each, h and c of the last real step, with the
directions side by side.
"""


class RKMEncoder(FairseqEncoder):
    """Source tokens to states. Padding may stand on either side and changes nothing.

    Args:
        cfg: the flags of ``--arch rkm``.
        dictionary: the source's.
        embed_tokens: the source's embedding.
    """

    def __init__(self, cfg: Any, dictionary: Dictionary, embed_tokens: nn.Embedding) -> None:
        super().__init__(dictionary)
        self.padding_idx = dictionary.pad()
        self.register_buffer(FINGERPRINT, fingerprint(dictionary))
        self.embed_tokens = embed_tokens
        self.dropout_words = cfg.dropout_words
        self.dropout_in = FairseqDropout(first_given(cfg.encoder_dropout_in, cfg.dropout), type(self).__name__)
        self.dropout_out = FairseqDropout(first_given(cfg.encoder_dropout_out, cfg.dropout), type(self).__name__)
        self.output_size = cfg.encoder_hidden_size * (2 if cfg.encoder_bidirectional else 1)
        sizes = [embed_tokens.embedding_dim] + [self.output_size] * (cfg.encoder_layers - 1)
        self.layers = nn.ModuleList(
            build_rkm(
                cfg, size, cfg.encoder_hidden_size, bidirectional=cfg.encoder_bidirectional,
                cell=str(first_given(cfg.encoder_cell, cfg.cell)), ngram=first_given(cfg.encoder_ngram, cfg.ngram),
                weight_dropout=cfg.dropout_weights, deviation=WORD_DEVIATION,
            )
            for size in sizes
        )  # fmt: skip

    def forward(self, src_tokens: Tensor, src_lengths: Optional[Tensor] = None, **_unused: Any) -> EncoderOut:
        """Encode a batch.

        Args:
            src_tokens: ``(B, S)`` int64, padded on the left or the right.
            src_lengths: not read: the padding symbol tells padding.
        """
        mask = src_tokens.eq(self.padding_idx)
        x = self.dropout_in(dropped_embedding(self.embed_tokens, src_tokens.t(), self.dropout_words, self.training))
        hiddens, memories = [], []
        for layer in self.layers:
            x, state = layer(x, padding_mask=mask)
            x = self.dropout_out(x)
            hiddens.append(_side_by_side(state.hidden))
            memories.append(_side_by_side(state.cell))
        return {
            "encoder_out": [x],
            "encoder_padding_mask": [mask],
            "encoder_hiddens": [torch.stack(hiddens)],
            "encoder_memories": [torch.stack(memories)],
        }

    def reorder_encoder_out(self, encoder_out: EncoderOut, new_order: Tensor) -> EncoderOut:
        """The output of these rows of the batch."""
        return {
            name: [tensor.index_select(tensor.dim() - 2, new_order) for tensor in tensors]
            for name, tensors in encoder_out.items()
        }

    def max_positions(self) -> int:
        """A recurrence has no limit; the task sets one."""
        return NO_LIMIT

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> None:
        """Refuse a checkpoint of another dictionary before reading its weights."""
        check_fingerprint(state_dict, f"{name}.", self, self.dictionary)


def _side_by_side(state: Tensor) -> Tensor:
    """Reshape ``(directions, B, d)`` to ``(B, directions * d)``."""
    return torch.cat(list(state), dim=-1)
