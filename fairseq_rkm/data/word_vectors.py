"""Pretrained word vectors in text format, with or without the header line that word2vec and fastText write."""

import logging
from pathlib import Path

import torch
from fairseq import utils
from fairseq.data import Dictionary
from torch import nn

from fairseq_rkm.errors import RKMError

logger = logging.getLogger(__name__)


def load_word_vectors(embedding: nn.Embedding, path: str, dictionary: Dictionary) -> None:
    """Overwrite the rows of an embedding whose words a file has; log how many that were.

    Args:
        embedding: ``(V, e)``, rows in the dictionary's order.
        path: a word and its e numbers a line, separated by spaces; GloVe's, fastText's and word2vec's text formats.
        dictionary: fairseq's.

    Raises:
        RKMError: no such file, or a line that has not e numbers.
    """
    if not Path(path).is_file():
        raise RKMError(f"no file of word vectors at {path}")
    vectors = {}
    with open(path, encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:
                continue
            vectors[fields[0]] = _vector(fields[1:], embedding.embedding_dim, f"{path}, line {number}")
    utils.load_embedding(vectors, dictionary, embedding)
    known = sum(word in vectors for word in dictionary.symbols)
    logger.info(f"word vectors from {path}: {known:,} of the dictionary's {len(dictionary):,} types")


def _vector(fields: list[str], size: int, where: str) -> torch.Tensor:
    if len(fields) != size:
        raise RKMError(f"{where}: {len(fields)} numbers, but the embedding has {size} dimensions")
    try:
        return torch.tensor([float(value) for value in fields])
    except ValueError:
        raise RKMError(f"{where}: not a word and {size} numbers separated by spaces") from None
