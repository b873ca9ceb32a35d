"""The first and last layers of all word-level models: words to vectors, and vectors to words' scores."""

import logging
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.modules import AdaptiveSoftmax
from omegaconf import II
from torch import nn

from fairseq_rkm.data.word_vectors import load_word_vectors
from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.machine_memory import check_machine_memory

logger = logging.getLogger(__name__)

LARGEST_UNIFORM = 0.1
"""The largest magnitude of a random word vector's numbers."""
WORD_DEVIATION = LARGEST_UNIFORM / 3**0.5
"""Their standard deviation."""


def build_embedding(
    dictionary: Dictionary, size: int, path: Optional[str] = None, freeze: bool = False
) -> nn.Embedding:
    """Build an embedding, ``(V, size)``, from U(-0.1, 0.1) or a file; the vector of padding is zero.

    Args:
        dictionary: fairseq's dictionary of V symbols.
        size: the numbers of a vector.
        path: a file of word vectors in text format, or None.
        freeze: do not train the vectors.

    Raises:
        RKMError: the file is missing or does not fit.
    """
    check_machine_memory(len(dictionary) * size, f"embeddings of {len(dictionary):,} words and size {size:,}")
    embedding = nn.Embedding(len(dictionary), size, padding_idx=dictionary.pad())
    nn.init.uniform_(embedding.weight, -LARGEST_UNIFORM, LARGEST_UNIFORM)
    if path:
        load_word_vectors(embedding, path, dictionary)
    with torch.no_grad():
        embedding.weight[dictionary.pad()].zero_()
    embedding.weight.requires_grad_(not freeze)
    return embedding


@dataclass
class SoftmaxOptions(FairseqDataclass):
    """The flags of :func:`build_softmax`."""

    adaptive_softmax_cutoff: Optional[str] = field(
        default=None,
        metadata={"help": "comma-separated cutoffs of an adaptive softmax; needs --criterion adaptive_loss"},
    )
    adaptive_softmax_dropout: float = field(default=0.0, metadata={"help": "on the adaptive softmax's projections"})
    adaptive_softmax_factor: float = field(default=4.0, metadata={"help": "how the adaptive softmax's sizes shrink"})
    criterion_name: Optional[str] = II("criterion._name")


def check_softmax(cfg: SoftmaxOptions) -> None:
    """Raise RKMError unless an adaptive softmax and its criterion come together."""
    if cfg.criterion_name == "adaptive_loss" and not cfg.adaptive_softmax_cutoff:
        raise RKMError("--criterion adaptive_loss needs --adaptive-softmax-cutoff")
    criterion = CRITERION_REGISTRY.get(cfg.criterion_name)
    of_fairseq = criterion is not None and criterion.__module__.startswith("fairseq.")
    if cfg.adaptive_softmax_cutoff and of_fairseq and cfg.criterion_name != "adaptive_loss":
        raise RKMError(
            f"--criterion {cfg.criterion_name} cannot train an adaptive softmax: with --adaptive-softmax-cutoff give "
            "--criterion adaptive_loss or cross_entropy_ar_tar"
        )


def build_softmax(cfg: Any, features: int, types: int, tied: Optional[nn.Embedding] = None) -> nn.Module:
    """Build the layer from features to words' scores: an adaptive softmax if ``cfg`` asks for one, else a linear layer.

    Args:
        cfg: :class:`SoftmaxOptions`, or an object with its attributes.
        features: the size of the features.
        types: the size of the vocabulary.
        tied: an embedding, ``(types, features)``, to share the weight with; None for a weight of its own.

    Raises:
        RKMError: the cutoffs are not increasing whole numbers below ``types``.
    """
    if cfg.adaptive_softmax_cutoff:
        cutoffs = parse_cutoffs(cfg.adaptive_softmax_cutoff, types)
        _tell_of_words_without_features(features, cutoffs, cfg.adaptive_softmax_factor)
        return AdaptiveSoftmax(
            types, features, cutoffs, dropout=cfg.adaptive_softmax_dropout, factor=cfg.adaptive_softmax_factor
        )
    check_machine_memory(types * features, f"a softmax of {types:,} words and size {features:,}")
    linear = nn.Linear(features, types)
    nn.init.uniform_(linear.weight, -0.1, 0.1)
    nn.init.zeros_(linear.bias)
    if tied is not None:
        linear.weight = tied.weight
    return linear


def _tell_of_words_without_features(features: int, cutoffs: list[int], factor: float) -> None:
    """Warn if an adaptive softmax has no features left for its rarest words: each band has ``factor`` times fewer."""
    for band, first in enumerate(cutoffs, 1):
        if features // factor**band < 1:
            logger.warning(
                f"--adaptive-softmax-factor {factor:g} leaves none of {features} features for words from {first} on: "
                "the model cannot tell them apart. Give a smaller factor or fewer cutoffs"
            )
            return


def parse_cutoffs(text: str, types: int) -> list[int]:
    """Read cutoffs: ``"2000,10000"`` is ``[2000, 10000]``.

    Raises:
        RKMError: the cutoffs are not increasing whole numbers between 0 and ``types``.
    """
    fields = text.strip("[]() ").split(",")
    if not all(f.strip().isdecimal() for f in fields):
        raise RKMError(f"--adaptive-softmax-cutoff takes whole numbers separated by commas, not {text!r}")
    cutoffs = [int(f) for f in fields]
    if cutoffs != sorted(set(cutoffs)) or cutoffs[0] < 1 or cutoffs[-1] >= types:
        raise RKMError(f"--adaptive-softmax-cutoff must increase from 1 to below the {types} types of the dictionary")
    return cutoffs
