"""Open a split that fairseq-preprocess wrote, in any of its formats."""

import logging
from pathlib import Path
from typing import Any, Optional

import numpy as np
from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import infer_dataset_impl

from fairseq_rkm.data.indexed_check import REMEDY, read_index
from fairseq_rkm.data.tokens import HeldTokens, JoinedTokens, StoredTokens, Tokens
from fairseq_rkm.errors import RKMError

logger = logging.getLogger(__name__)

LEGACY = "lazy", "cached"
"""Two ways to read one format, which is another than mmap's."""
RAW = "", ".None-None"
"""Ends of the names of raw text: a language model's has no languages, and fairseq-preprocess puts None there."""


def open_tokens(
    path: str, dictionary: Dictionary, implementation: Optional[str] = None, combine: bool = False
) -> Tokens:
    """Open a split. Its tokens are read in order, end-of-sentence symbols included.

    Files of numbers stay on the disk until a stretch of them is read. Raw text is numbered and held in memory.

    >>> open_tokens("runs/lm/data/train", dictionary).read(0, 3)
    array([ 9, 24,  4])

    Args:
        path: the folder and the split's name.
        dictionary: of the tokens.
        implementation: ``--dataset-impl``; None tells it from the files.
        combine: read ``train1``, ``train2``, ... after ``train``.

    Raises:
        RKMError: the split is missing, empty, damaged, or of another format than ``implementation``, or a token that
            was looked at is not in the dictionary (see :class:`~fairseq_rkm.data.tokens.StoredTokens`).
    """
    parts = [_open(path, dictionary, implementation)]
    while combine and _exists(following := f"{path}{len(parts)}"):
        parts.append(_open(following, dictionary, implementation))
    tokens = parts[0] if len(parts) == 1 else JoinedTokens(parts)
    if not len(tokens):
        raise RKMError(f"the split {Path(path).name!r} at {path} is empty")
    logger.info(f"{path}: {len(tokens):,} tokens")
    return tokens


def _open(path: str, dictionary: Dictionary, implementation: Optional[str]) -> Tokens:
    path, implementation = _locate(path, implementation)
    if implementation == "raw":
        sentences = data_utils.load_indexed_dataset(path, dictionary, "raw")
        return HeldTokens(np.concatenate([sentences[i].numpy().astype(np.int32) for i in range(len(sentences))]))
    data, index = Path(f"{path}.bin"), Path(f"{path}.idx")
    if not index.is_file():
        raise RKMError(f"{index} is missing, beside {data.name}: {REMEDY}")
    read = read_index(index)
    if read is None:
        raise RKMError(
            f"{index} is of the format huffman, whose numbers are not those of dict.txt: run fairseq-preprocess with "
            "--dataset-impl mmap"
        )
    return StoredTokens(read, data, len(dictionary))


def prefetch(sentences: Any) -> None:
    """Read all sentences of a dataset of a kind that holds none until it is told to."""
    parts = getattr(sentences, "datasets", [sentences])
    for part in parts:
        if getattr(part, "supports_prefetch", False):
            part.prefetch(range(len(part)))


def _exists(path: str) -> bool:
    return any(Path(f"{path}{end}").is_file() for end in (".bin", ".idx", *RAW))


def _locate(path: str, implementation: Optional[str]) -> tuple[str, Optional[str]]:
    """Return the path of a split, and its format if fairseq has to be told."""
    split, binary = Path(path).name, Path(f"{path}.bin")
    raw = next((f"{path}{end}" for end in RAW if Path(f"{path}{end}").is_file()), None)
    if binary.is_file() and (raw != path or implementation not in {None, "raw"}):
        if not binary.stat().st_size:
            raise RKMError(f"the split {split!r} at {binary} is empty")
        if implementation is not None:
            _check_format(path, binary, implementation)
        return path, implementation
    if raw is None:
        raise RKMError(f"no binarized split {split!r} at {binary}: was it given to fairseq-preprocess?")
    if implementation not in {None, "raw"}:
        raise RKMError(f"--dataset-impl {implementation}: {raw} is raw text; leave the flag out")
    if not Path(raw).stat().st_size:
        raise RKMError(f"the split {split!r} at {raw} is empty")
    return raw, "raw"


def _check_format(path: str, binary: Path, implementation: str) -> None:
    """Raise RKMError if binarized data is of another format than ``--dataset-impl``."""
    found = infer_dataset_impl(path)
    kinds = LEGACY if found in LEGACY else (found,)
    # Of a folder or raw text of the same name fairseq says "raw".
    if found not in {None, "raw"} and implementation not in kinds:
        raise RKMError(
            f"--dataset-impl {implementation}: {binary} is of the format {' or '.join(kinds)}; leave the flag out, or "
            "run fairseq-preprocess with it"
        )
