"""The windows of a split as fairseq's data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import FairseqDataset

from fairseq_rkm.data.signals.signal_store import Split


class SignalDataset(FairseqDataset):
    """Windows of signals and their classes.

    Batches hold windows of about one length. ``--max-tokens`` counts steps of time, padding included.

    Args:
        split: an open split.
        shuffle: whether windows of one length come in another order each epoch.
    """

    def __init__(self, split: Split, shuffle: bool) -> None:
        self.split, self.shuffle = split, shuffle

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length = int(self.split.starts[index]), int(self.split.lengths[index])
        window = np.array(self.split.values[start : start + length])  # a copy: torch takes no read-only arrays
        return {"id": int(index), "source": torch.from_numpy(window), "target": int(self.split.labels[index])}

    def __len__(self) -> int:
        return len(self.split.starts)

    @property
    def sizes(self) -> np.ndarray:
        """Each window's steps, ``(windows,)`` int64."""
        return self.split.lengths

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False: with ``shuffle`` the batches differ from one epoch to the next."""
        return not self.shuffle

    def num_tokens(self, index: int) -> int:
        """The steps of a window."""
        return int(self.split.lengths[index])

    def num_tokens_vec(self, indices: Any) -> np.ndarray:
        """The steps of windows."""
        return self.split.lengths[indices]

    def size(self, index: int) -> int:
        """The steps of a window."""
        return self.num_tokens(index)

    def ordered_indices(self) -> np.ndarray:
        """All windows by length; those of one length in a random order if ``shuffle``. fairseq seeds it by epoch."""
        order = np.random.permutation(len(self)) if self.shuffle else np.arange(len(self))  # noqa: NPY002
        return order[np.argsort(self.split.lengths[order], kind="stable")]

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: ``net_input`` with ``source`` and ``padding_mask``, and ``target`` ``(B,)`` int64."""
        if not samples:
            return {}
        source, mask = pad([sample["source"] for sample in samples])
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {"source": source, "padding_mask": mask},
            "target": torch.tensor([sample["target"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": sum(len(sample["source"]) for sample in samples),
        }


def pad(windows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One batch of windows.

    Args:
        windows: each ``(time, channels)`` float32.

    Returns:
        ``(B, T, channels)``, zero behind the end of each, and its mask ``(B, T)`` bool, True at padding; None if all
        windows have one length.
    """
    lengths = torch.tensor([len(window) for window in windows])
    source = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True)
    if bool((lengths == lengths[0]).all()):
        return source, None
    return source, torch.arange(source.size(1)) >= lengths.unsqueeze(1)
