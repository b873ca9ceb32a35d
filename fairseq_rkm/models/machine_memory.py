"""Refuse weights too large for the machine before taking memory for them."""

import os

from fairseq_rkm.errors import RKMError


def check_machine_memory(numbers: int, what: str) -> None:
    """Refuse more weights than this machine's memory holds; the system would end the process without a word.

    Args:
        numbers: the number of float32 weights.
        what: the weights and their sizes, as the error's subject.

    Raises:
        RKMError: the weights need more bytes than the memory has.
    """
    wanted, total = 4 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > total:
        raise RKMError(
            f"{what} would take {wanted / 2**30:,.0f} GiB, and this machine has {total / 2**30:,.0f}: make them smaller"
        )
