"""The sizes of batches that kernels and their buffers are made for."""

from typing import Any


def round_up(batch: int) -> int:
    """A multiple of 8, beyond 64 of 16, beyond 128 of 32, and so on: a quarter more than the batch at most.

    What is made takes a second or some memory, and must serve many batches. A launch gets the true one.
    """
    step = max(8, 1 << (batch - 1).bit_length() >> 3)
    return -(-batch // step) * step


def likely(batch: Any) -> int:
    """The batch itself; of one that is a variable to torch.compile, the number that it was met with.

    An estimate may depend on this. Asked for the variable itself, the compiler would make a program for each answer.
    """
    if isinstance(batch, int):
        return batch
    hint = getattr(batch.node, "hint", None)
    return hint if isinstance(hint, int) else 1
