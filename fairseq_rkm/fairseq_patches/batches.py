"""Every sentence stands in one batch, in training, validation, translation and evaluation, with every task.

fairseq's ``batch_by_size`` drops the last batch unless its size is a multiple of ``--required-batch-size-multiple``
(default: 8). With ``--grouped-shuffling`` and several processes it also drops a last group of too few batches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import data_utils, iterators

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    data_utils,
    "batch_by_size",
    why="a last batch of no multiple of 8 sentences is left out without a word, and no sentence at all fails",
    until="fairseq keeps the last batch",
)
def keep_all(batch_by_size: Callable[..., list]) -> Callable[..., list]:
    """Make ``batch_by_size`` return fairseq's batches, and then one batch of the sentences that fairseq left out."""

    def batches(
        indices: Any,
        num_tokens_fn: Callable[[int], int],
        num_tokens_vec: Any = None,
        max_tokens: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> list:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        if not len(indices):
            return []
        check_longest(indices, num_tokens_fn, num_tokens_vec, max_tokens)
        shaped = list(batch_by_size(indices, num_tokens_fn, num_tokens_vec, max_tokens, *args, **kwargs))
        # fairseq's batches follow each other in the order of the indices: only the end can be missing.
        left_out = indices[sum(map(len, shaped)) :]
        return [*shaped, left_out] if len(left_out) else shaped

    return batches


def check_longest(
    indices: np.ndarray, num_tokens_fn: Callable[[int], int], num_tokens_vec: Any, max_tokens: int | None
) -> None:
    """Refuse a sentence that is longer than a batch may be.

    Args:
        indices: ``(N,)`` int64, the sentences' numbers.
        num_tokens_fn: gives the number of tokens of one sentence.
        num_tokens_vec: ``(N,)`` numbers of tokens, if they are known; else ``num_tokens_fn`` is called.
        max_tokens: the most tokens of a batch; None or a number below 1 sets no limit.

    Raises:
        RKMError: a sentence has more than ``max_tokens`` tokens.
    """
    if max_tokens is None or max_tokens < 1:
        return
    lengths = np.asarray(
        num_tokens_vec if num_tokens_vec is not None else [num_tokens_fn(int(index)) for index in indices]
    )
    longest = int(np.argmax(lengths))
    if lengths[longest] > max_tokens:
        raise RKMError(
            f"sentence {indices[longest]} (counted from 0) has {lengths[longest]} tokens, more than the "
            f"{int(max_tokens)} that --max-tokens allows a batch: give --max-tokens {lengths[longest]} or more"
        )


@patch(
    iterators.EpochBatchIterator,
    "ordered_batches",
    why="--grouped-shuffling leaves out the batches that are too few to be one for each process",
    until="fairseq groups all batches",
)
def keep_last_group(ordered_batches: Callable[..., list]) -> Callable[..., list]:
    """Make ``ordered_batches`` fill the last group with empty batches, as fairseq does without the flag."""

    def ordered(self: iterators.EpochBatchIterator, *args: Any, **kwargs: Any) -> list:
        if self.grouped_shuffling:
            empty: list[list[int]] = [[]] * (-len(self.frozen_batches) % self.num_shards)
            self._frozen_batches = (*self.frozen_batches, *empty)
        return ordered_batches(self, *args, **kwargs)

    return ordered
