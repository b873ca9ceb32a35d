"""Shapes and dropouts of ``rkm`` for corpora of two sizes, as fairseq's named architectures."""

import argparse
from typing import Any

from fairseq.models import register_model_architecture

import fairseq_rkm.models.translation.rkm_model  # noqa: F401  registers rkm; these are its presets
from fairseq_rkm.ops.cells import is_bound


def _fill(args: argparse.Namespace, **values: Any) -> None:
    """Set the flags that the user left out."""
    for name, value in values.items():
        setattr(args, name, getattr(args, name, value))


@register_model_architecture("rkm", "rkm_tiny")
def rkm_tiny(args: argparse.Namespace) -> None:
    """For tests and first tries: trains in a minute on a CPU. The memory is normalised unless it is clipped."""
    _fill(
        args, encoder_embed_dim=64, encoder_hidden_size=64, encoder_bidirectional=True,
        decoder_embed_dim=64, decoder_hidden_size=64, dropout=0.0,
        layer_norm=not is_bound(getattr(args, "memory_clip", "auto")),
    )  # fmt: skip


@register_model_architecture("rkm", "rkm_iwslt_de_en")
def rkm_iwslt_de_en(args: argparse.Namespace) -> None:
    """For corpora of some 30,000 to 300,000 sentence pairs with a subword vocabulary of some 10,000.

    The memory is clipped unless it is normalised. Normalising is worse here: examples/translation/README.md.
    """
    _fill(
        args, ngram_padding="same", encoder_ngram=None if hasattr(args, "ngram") else 3,
        encoder_embed_dim=256, encoder_hidden_size=256, encoder_layers=2, encoder_bidirectional=True,
        decoder_embed_dim=256, decoder_hidden_size=512, decoder_layers=2, attention_layer=1,
        memory_clip="auto" if getattr(args, "layer_norm", False) else "3.0",
        dropout=0.4, dropout_words=0.1, dropout_weights=0.0 if getattr(args, "input_feeding", False) else 0.2,
        share_decoder_input_output_embed=getattr(args, "adaptive_softmax_cutoff", None) is None,
    )  # fmt: skip
