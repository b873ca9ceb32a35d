"""Pretrained word vectors in text format, with or without the header line of word2vec and fastText."""

import logging
from pathlib import Path

import torch
from fairseq import utils
from fairseq.data import Dictionary
from torch import nn

from fairseq_rkm.errors import RKMError

logger = logging.getLogger(__name__)


def load_word_vectors(embedding: nn.Embedding, path: str, dictionary: Dictionary) -> None:
    """Overwrite the rows of an embedding for the words of a file, and log how many there were.

    Args:
        embedding: ``(V, e)``, rows in the dictionary's order.
        path: a file in the text format of GloVe, fastText or word2vec. A line is a word and its e numbers, separated by
            spaces.
        dictionary: fairseq's, of V symbols.

    Raises:
        RKMError: there is no such file, a line has not e finite numbers, or no word is in the dictionary.
    """
    if not Path(path).is_file():
        raise RKMError(f"no file of word vectors at {path}")
    size, first = embedding.embedding_dim, 1
    vectors = {}
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip().split(" ")
            if number == 1 and len(fields) == 2:
                first = 2
                continue
            where = f"{path}, line {number}"
            if len(fields) <= size or (number == first and len(fields) > size + 1):
                raise RKMError(f"{where}: {len(fields) - 1} numbers, but the embedding has {size} dimensions")
            # GloVe's largest file has a few words with spaces in them.
            word = " ".join(fields[:-size])
            if word in dictionary:
                vectors[word] = _vector(fields[-size:], where)
    if not any(dictionary.index(word) >= dictionary.nspecial for word in vectors):
        raise RKMError(
            f"{path} has none of the dictionary's {len(dictionary) - dictionary.nspecial:,} words: is it of another "
            "language, or is the text lowercased or cut into pieces, and the file is not?"
        )
    utils.load_embedding(vectors, dictionary, embedding)
    known, types = len(vectors), len(dictionary)
    logger.info(f"word vectors from {path}: {known:,} of the dictionary's {types:,} types ({100 * known / types:.1f}%)")


def _vector(fields: list[str], where: str) -> torch.Tensor:
    try:
        vector = torch.tensor([float(value) for value in fields])
    except ValueError:
        raise RKMError(f"{where}: not a word and {len(fields)} numbers separated by spaces") from None
    if not vector.isfinite().all():
        raise RKMError(f"{where}: a number that is not finite, or beyond float32")
    return vector
