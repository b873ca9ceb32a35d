"""Tell one dictionary from another: a model whose words have moved gives nonsense without a warning."""

import hashlib

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError

FINGERPRINT = "dictionary_fingerprint_version"
"""The name of the model's buffer with the fingerprint.

fairseq's exponential moving average (``--store-ema``) goes through a model's ``state_dict``. It leaves out names with
"version" in them. It averages all others, and fails with whole numbers.
"""

FORMER = "dictionary_fingerprint"
"""The buffer's name in older checkpoints."""


def fingerprint(dictionary: Dictionary) -> Tensor:
    """Return eight numbers below 2**32, ``(8,)`` int64, that change with any symbol or its place.

    They survive the averaging of checkpoints by sums and divisions.
    """
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode()).digest()
    return torch.tensor([int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)])


def check_fingerprint(state_dict: dict, prefix: str, module: nn.Module, dictionary: Dictionary) -> None:
    """Compare a checkpoint's dictionary with a module's. A checkpoint without fingerprint is given the module's.

    Args:
        state_dict: the checkpoint's weights, changed in place; its attribute ``read_from``, if it has one, names the
            file.
        prefix: of the module's names in ``state_dict``.
        module: has the buffer :data:`FINGERPRINT` of ``dictionary``.
        dictionary: the module's; its attribute ``read_from``, if it has one, names the file.

    Raises:
        RKMError: the dictionaries differ.
    """
    own = module.get_buffer(FINGERPRINT)
    if prefix + FORMER in state_dict:
        state_dict[prefix + FINGERPRINT] = state_dict.pop(prefix + FORMER)
    given = state_dict.setdefault(prefix + FINGERPRINT, own)
    if given is not own and not torch.equal(given.cpu(), own.cpu()):
        raise RKMError(
            f"{getattr(state_dict, 'read_from', 'the checkpoint')} was trained with another dictionary than "
            f"{getattr(dictionary, 'read_from', 'this data has')}: give the binarized data that it was trained on, or "
            "binarize yours with --srcdict and that dictionary"
        )
