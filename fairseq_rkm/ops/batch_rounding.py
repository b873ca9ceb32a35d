"""The sizes of batches that kernels and their buffers are made for."""


def round_up(batch: int) -> int:
    """A multiple of 8, beyond 64 of 16, beyond 128 of 32, and so on: a quarter more than the batch at most.

    What is made takes a second or some memory, and must serve many batches. A launch gets the true one.
    """
    step = max(8, 1 << (batch - 1).bit_length() >> 3)
    return -(-batch // step) * step
