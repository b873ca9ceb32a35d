"""Weights that do not fit into the machine are refused before memory is taken for them."""

import os

from fairseq_rkm.errors import RKMError


def check_machine_memory(numbers: int, what: str) -> None:
    """Refuse more weights than this machine's memory holds: the system would end the process without a word.

    Args:
        numbers: how many float32 numbers there are to be.
        what: these are, with the sizes that make them so many.

    Raises:
        RKMError: they need more bytes than there is memory.
    """
    wanted, total = 4 * numbers, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > total:
        raise RKMError(
            f"{what} would take {wanted / 2**30:,.0f} GiB, and this machine has {total / 2**30:,.0f}: make them smaller"
        )
