"""Telling one dictionary from another: a model whose words have moved gives nonsense without a word of warning."""

import hashlib

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_rkm.errors import RKMError


def fingerprint(dictionary: Dictionary) -> Tensor:
    """Eight numbers below 2**32, ``(8,)`` int64, that change with any symbol or its place.

    They survive the averaging of checkpoints, which sums and divides.
    """
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode()).digest()
    return torch.tensor([int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)])


def check_fingerprint(state_dict: dict, key: str, own: Tensor) -> None:
    """Raises RKMError if a checkpoint's fingerprint under ``key`` is not ``own``; a checkpoint without one passes."""
    given = state_dict.setdefault(key, own)
    if not torch.equal(given.cpu(), own.cpu()):
        raise RKMError(
            "the checkpoint was trained with another dictionary than this data's dict.txt: give the binarized data "
            "that it was trained on, or binarize yours with --srcdict and that dictionary"
        )
