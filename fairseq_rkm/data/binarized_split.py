"""Read a split that fairseq-preprocess wrote, in any of its formats."""

from pathlib import Path
from typing import Any, Optional

import torch
from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import infer_dataset_impl
from torch import Tensor

from fairseq_rkm.errors import RKMError

LEGACY = "lazy", "cached"
"""Two ways to read one format, which is another than mmap's."""


def read_tokens(
    path: str, dictionary: Dictionary, implementation: Optional[str] = None, combine: bool = False
) -> Tensor:
    """Return all tokens of a split in order, ``(N,)`` int64, end-of-sentence symbols included.

    >>> read_tokens("runs/lm/data/train", dictionary)
    tensor([ 9, 24,  4,  ..., 17,  6,  2])

    Args:
        path: the folder and the split's name.
        dictionary: for raw text.
        implementation: ``--dataset-impl``; None tells it from the files.
        combine: read ``train1``, ``train2``, ... after ``train``.

    Raises:
        RKMError: the split is missing, empty, or of another format than ``implementation``.
    """
    path, implementation = _locate(path, implementation)
    sentences = data_utils.load_indexed_dataset(path, dictionary, implementation, combine=combine)
    if sentences is None or not len(sentences):
        raise RKMError(f"the split {Path(path).name!r} at {path} is empty")
    prefetch(sentences)
    tokens = torch.cat([sentences[i] for i in range(len(sentences))]).long()
    if not len(tokens):
        raise RKMError(f"the split {Path(path).name!r} at {path} is empty")
    return tokens


def prefetch(sentences: Any) -> None:
    """Read all sentences of a dataset of a kind that holds none until it is told to."""
    parts = getattr(sentences, "datasets", [sentences])
    for part in parts:
        if getattr(part, "supports_prefetch", False):
            part.prefetch(range(len(part)))


def _locate(path: str, implementation: Optional[str]) -> tuple[str, Optional[str]]:
    """Return the path of a split, and its format if fairseq has to be told."""
    split, binary = Path(path).name, Path(f"{path}.bin")
    if binary.is_file():
        if not binary.stat().st_size:
            raise RKMError(f"the split {split!r} at {binary} is empty")
        found = infer_dataset_impl(path)
        if found is None:
            raise RKMError(f"{path}.idx is no index of fairseq's: it is damaged, run fairseq-preprocess again")
        kinds = LEGACY if found in LEGACY else (found,)
        if implementation is not None and implementation not in kinds and found != "raw":
            raise RKMError(
                f"--dataset-impl {implementation}: {binary} is of the format {' or '.join(kinds)}; leave the "
                "flag out, or run fairseq-preprocess with it"
            )
        return path, implementation
    # A language model's text has no languages: fairseq-preprocess puts None in their place.
    raw = next((name for name in (path, f"{path}.None-None") if Path(name).is_file()), None)
    if raw is None:
        raise RKMError(f"no binarized split {split!r} at {binary}: was it given to fairseq-preprocess?")
    if implementation not in {None, "raw"}:
        raise RKMError(f"--dataset-impl {implementation}: {raw} is raw text; leave the flag out")
    if not Path(raw).stat().st_size:
        raise RKMError(f"the split {split!r} at {raw} is empty")
    return raw, "raw"
