"""Cut a corpus, one stream of tokens, into parallel streams, and these into segments that follow each other."""

import zlib
from typing import Any, ClassVar

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from torch import Tensor

from fairseq_rkm.errors import RKMError


class TokenStream(FairseqDataset):
    """All tokens of a split, in order, end-of-sentence symbols included.

    Args:
        tokens: ``(N,)`` int64.
        eos: the number of the symbol that the first token is predicted from.
        name: the split's name, for messages.
    """

    def __init__(self, tokens: Tensor, eos: int, name: str) -> None:
        self.tokens, self.eos, self.name = tokens, eos, name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> int:
        return int(self.tokens[index])

    def fingerprint(self) -> str:
        """Return the number of tokens, and a checksum of at most a million of them, evenly spread."""
        spread = self.tokens[:: max(1, len(self) // 1_000_000)].to(torch.int64)
        return f"{len(self)} tokens, checksum {zlib.crc32(spread.contiguous().numpy().tobytes()):08x}"

    def check_streams(self, streams: int) -> None:
        """Raise RKMError if there are fewer tokens than streams."""
        if len(self) < streams:
            raise RKMError(
                f"the split {self.name!r} has {len(self)} tokens, fewer than the {streams} parallel streams "
                "(--batch-size times processes) that it is to be cut into: use a smaller --batch-size or more text"
            )


MIN_LENGTH = 5
"""The fewest tokens of a segment of random length."""


def random_lengths(total: int, length: int, seed: tuple[int, int]) -> list[int]:
    """Draw lengths of segments that fill ``total`` tokens, as in Merity et al. (2018), section 5.

    Each length is ``max(5, int(Normal(base, 5)))``. The base is ``length`` with probability 0.95, and half of it
    otherwise. The last segment takes the rest; a rest of fewer than 5 tokens joins the segment before.

    >>> sum(random_lengths(1000, 70, seed=(1, 1)))
    1000

    Args:
        total: tokens in a stream, at least 1.
        length: tokens in a typical segment.
        seed: a run's seed and the epoch, both from 0.
    """
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    left = total
    while left:
        base = length if generator.random() < 0.95 else length / 2
        drawn = max(MIN_LENGTH, int(generator.normal(base, 5)))
        lengths.append(left if left < drawn + MIN_LENGTH else drawn)
        left -= lengths[-1]
    return lengths


class StreamSegments(FairseqDataset):
    """Segments of some of a corpus's parallel streams. Item k is a batch of the k-th segment of each of them.

    The N tokens are cut into ``streams`` stretches; the first ``N mod streams`` of them are one token longer. Every
    token is a target once. A stretch's first token is predicted from the token before it in the corpus, with a zero
    state. The corpus's first token is predicted from the end-of-sentence symbol.

    >>> stream = TokenStream(torch.arange(4, 14), eos=2, name="train")
    >>> segments = StreamSegments(stream, streams=2, rows=(0, 2), length=3, pad=1)
    >>> segments[0]["net_input"]["src_tokens"], segments[0]["target"]
    (tensor([[ 2,  4,  5],
            [ 8,  9, 10]]), tensor([[ 4,  5,  6],
            [ 9, 10, 11]]))

    Args:
        stream: the corpus.
        streams: the number of stretches.
        rows: the stretches of a data-parallel rank, as ``(first, last + 1)``.
        length: tokens in a segment; the last may be shorter.
        pad: fills the last segment's last column in rows of shorter stretches.
        length_seed: makes lengths vary around ``length`` (see :func:`random_lengths`), the same for all rows.

    Attributes:
        cut: all facts that decide, beside the epoch, which tokens the k-th segment holds.

    Raises:
        RKMError: there are fewer tokens than streams.
    """

    def __init__(
        self, stream: TokenStream, streams: int, rows: tuple[int, int], length: int, pad: int,
        length_seed: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        stream.check_streams(streams)
        quotient, longer = divmod(len(stream), streams)
        lengths = torch.full((streams,), quotient)
        lengths[:longer] += 1
        starts = lengths.cumsum(0) - lengths
        columns = torch.arange(int(lengths.max()))
        if length_seed is None:
            self.segments = columns.split(length)
        else:
            self.segments = columns.split(random_lengths(len(columns), length, length_seed))
        here = slice(*rows)
        index = starts[here].unsqueeze(1) + columns
        real = columns < lengths[here].unsqueeze(1)
        before = torch.cat([torch.tensor([stream.eos]), stream.tokens])
        index = index.clamp(max=len(stream) - 1)
        self.source = before[index].masked_fill(~real, pad)
        self.target = stream.tokens[index].masked_fill(~real, pad)
        self.first_row = rows[0]
        self.pad = pad
        seed = None if length_seed is None else length_seed[0]
        self.cut: dict[str, Any] = {
            "text": stream.fingerprint(), "streams": streams, "length": length, "varied": length_seed is not None,
            "seed": seed,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> dict:
        columns = self.segments[index]
        source, target = self.source[:, columns].contiguous(), self.target[:, columns].contiguous()
        rows = source.size(0)
        return {
            "id": torch.arange(self.first_row, self.first_row + rows),
            "nsentences": rows,
            "ntokens": int(target.ne(self.pad).sum()),
            "net_input": {
                "src_tokens": source,
                "src_lengths": torch.full((rows,), source.size(1)),
                "segment": index,
            },
            "target": target,
        }

    def collater(self, samples: list[dict]) -> dict:
        """Return the one segment that is given: it is a batch already."""
        return samples[0] if samples else {}


class SegmentIterator(EpochBatchIterator):
    """fairseq's iterator over :class:`StreamSegments`. Within an epoch it resumes only at the place where it stopped.

    It refuses to resume in a text that was cut into other segments.
    """

    FLAGS: ClassVar = {
        "text": "the training text (--train-subset, the data folder)",
        "streams": "--batch-size times processes",
        "length": "--tokens-per-sample",
        "varied": "--variable-bptt",
        "seed": "--seed, by which --variable-bptt draws lengths",
    }
    """The flag or data that decides each part of :attr:`StreamSegments.cut`."""

    def state_dict(self) -> dict[str, Any]:
        """Return fairseq's state, and how the text is cut."""
        return {**super().state_dict(), "cut": dict(self.dataset.cut)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            RKMError: the checkpoint stopped within an epoch of a text that was cut into other segments. Its number of
                segments would be another place in the text, and the carried state would not belong there.
        """
        within = state.get("iterations_in_epoch", 0)
        cut, saved = self.dataset.cut, state.get("cut")
        if within and saved is not None:
            others = [key for key in self.FLAGS if saved.get(key) != cut[key]]
            if others:
                changes = "; ".join(f"{self.FLAGS[key]}: {saved.get(key)}, now {cut[key]}" for key in others)
                raise RKMError(
                    f"the checkpoint stopped within epoch {state['epoch']}, after {within} segments of a text that was "
                    f"cut otherwise ({changes}). Resume as it was trained, or begin an epoch anew with "
                    "--reset-dataloader"
                )
        if within > len(self.dataset):
            raise RKMError(
                f"the checkpoint stopped after {within} segments of an epoch that has {len(self.dataset)} now: resume "
                "with the data and flags that it was trained with, or begin an epoch anew with --reset-dataloader"
            )
        super().load_state_dict(state)
