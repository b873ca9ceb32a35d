"""Cut a corpus, one stream of tokens, into parallel streams, and these into segments that follow each other."""

import functools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from torch import Tensor

from fairseq_rkm.data.indexed_check import spread
from fairseq_rkm.data.stream_order import Passes, Streams, check_overlap
from fairseq_rkm.data.tokens import HeldTokens, Tokens
from fairseq_rkm.errors import RKMError

FINGERPRINT = 1_000_000
"""The most tokens that a fingerprint is made from."""
READ_WHOLE = 1 << 24
"""The most tokens of a text whose fingerprint is made from tokens all over it."""


class TokenStream(FairseqDataset):
    """All tokens of a split, in order, end-of-sentence symbols included.

    Args:
        tokens: the tokens, or ``(N,)`` int64.
        eos: the number of the symbol that the first token is predicted from.
        name: the split's name, for messages.
    """

    def __init__(self, tokens: Tokens | Tensor, eos: int, name: str) -> None:
        self.tokens = HeldTokens(tokens) if isinstance(tokens, Tensor) else tokens
        self.eos, self.name = eos, name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> int:
        at = range(len(self))[index]
        return int(self.tokens.read(at, at + 1)[0])

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens from ``first`` to ``stop - 1``, int64. Before the first, at -1, is the symbol ``eos``."""
        tokens = self.tokens.read(max(first, 0), stop)
        return tokens if first >= 0 else np.concatenate([[self.eos], tokens])

    def fingerprint(self) -> str:
        """Return the number of tokens, and a checksum of at most about a million of them.

        They lie evenly spread. Of a large text stretches are taken, which are in few places of the file.
        """
        if len(self) <= READ_WHOLE:
            return self.spread_fingerprint()
        parts = (self.tokens.read(*stretch) for stretch in spread(len(self), FINGERPRINT))
        return f"{len(self)} tokens, checksum of stretches {checksum(parts)}"

    def spread_fingerprint(self) -> str:
        """Return the fingerprint as it was for texts of any size; it reads all of the text."""
        step = max(1, len(self) // FINGERPRINT)
        chunk = step * (FINGERPRINT // 10)
        starts = range(0, len(self), chunk)
        parts = (self.tokens.read(first, min(first + chunk, len(self)))[::step] for first in starts)
        return f"{len(self)} tokens, checksum {checksum(parts)}"

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Return whether a fingerprint of now or of before is this text's."""
        if fingerprint == self.fingerprint():
            return True
        older = fingerprint.startswith(f"{len(self)} tokens, checksum ") and "stretches" not in fingerprint
        return older and fingerprint == self.spread_fingerprint()

    def check_streams(self, streams: int) -> None:
        """Raise RKMError if there are fewer tokens than streams."""
        if len(self) < streams:
            raise RKMError(
                f"the split {self.name!r} has {len(self)} tokens, fewer than the {streams} parallel streams "
                "(--batch-size times processes) that it is to be cut into: use a smaller --batch-size or more text"
            )


def checksum(parts: Iterable[np.ndarray]) -> str:
    """Return the CRC-32 of int64 arrays one after the other, in hexadecimal digits."""
    return f"{functools.reduce(lambda before, part: zlib.crc32(part.tobytes(), before), parts, 0):08x}"


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


BLOCK = 1 << 19
"""Tokens that are read at a time, the rows together, unless a segment has more."""


class Block(NamedTuple):
    """Columns ``first`` to ``stop - 1`` of the rows of :class:`StreamSegments`, ``(rows, stop - first)`` int64."""

    first: int
    stop: int
    source: np.ndarray
    target: np.ndarray


class StreamSegments(FairseqDataset):
    """Segments of some of a corpus's parallel streams. Item k is a batch of the k-th segment of each of them.

    The N tokens are cut into ``streams`` stretches; the first ``N mod streams`` of them are one token longer. Every
    token is a target once. A stretch's first token is predicted from the token before it in the corpus, with a zero
    state. The corpus's first token is predicted from the end-of-sentence symbol.

    With ``overlap`` the corpus is read so many times over, and every token is a target so many times
    (:class:`~fairseq_rkm.data.stream_order.Passes`). Segments of one length are then cut at different places in each
    pass; to this end a stretch has whole segments, except the last. With ``shuffle_seed`` each stretch is rotated
    (:class:`~fairseq_rkm.data.stream_order.Streams`). A token is predicted from the token before it in the corpus even
    where the order jumps; the state is then of the tokens read before.

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
        shuffle_seed: a run's seed and the epoch, to rotate the stretches by.
        overlap: passes over the corpus.

    Attributes:
        cut: all facts that decide, beside the epoch, which tokens the k-th segment holds.

    Raises:
        RKMError: there are fewer tokens than streams, or ``overlap`` does not go with streams or length.
    """

    def __init__(
        self, stream: TokenStream, streams: int, rows: tuple[int, int], length: int, pad: int,
        length_seed: tuple[int, int] | None = None, shuffle_seed: tuple[int, int] | None = None, overlap: int = 1,
    ) -> None:  # fmt: skip
        stream.check_streams(streams)
        check_overlap(overlap, streams, length)
        self.stream, self.rows, self.pad = stream, rows, pad
        unit = length if overlap > 1 and length_seed is None else 1
        self.order = Streams(Passes(len(stream), overlap, length), streams, unit, shuffle_seed)
        total = self.order.sizes[0]
        self.ends = (
            range(length, total + length, length)
            if length_seed is None
            else np.cumsum(random_lengths(total, length, length_seed))
        )
        self.total = total
        self.block = Block(0, 0, np.empty((0, 0)), np.empty((0, 0)))
        seed = length_seed or shuffle_seed
        self.cut: dict[str, Any] = {
            "text": stream.fingerprint(), "streams": streams, "length": length, "varied": length_seed is not None,
            "shuffled": shuffle_seed is not None, "overlap": overlap, "seed": None if seed is None else seed[0],
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        first, stop = int(self.ends[index - 1]) if index else 0, min(int(self.ends[index]), self.total)
        if not (self.block.first <= first and stop <= self.block.stop):
            self.block = self._read(first, max(stop, min(first + BLOCK // (self.rows[1] - self.rows[0]), self.total)))
        columns = slice(first - self.block.first, stop - self.block.first)
        source, target = (torch.tensor(part[:, columns]) for part in (self.block.source, self.block.target))
        rows = len(source)
        return {
            "id": torch.arange(*self.rows),
            "nsentences": rows,
            "ntokens": int(target.ne(self.pad).sum()),
            "net_input": {
                "src_tokens": source,
                "src_lengths": torch.full((rows,), source.size(1)),
                "segment": index,
            },
            "target": target,
        }

    def _read(self, first: int, stop: int) -> "Block":
        """Read columns of all rows."""
        rows = range(*self.rows)
        block = Block(first, stop, *np.full((2, len(rows), stop - first), self.pad))
        for source, target, row in zip(block.source, block.target, rows, strict=True):
            at = 0
            for begin, end in self.order.places(row, first, min(stop, self.order.sizes[row])):
                tokens, columns = self.stream.read(begin - 1, end), slice(at, at := at + end - begin)
                source[columns], target[columns] = tokens[:-1], tokens[1:]
        return block

    def collater(self, samples: list[dict]) -> dict:
        """Return the one segment that is given: it is a batch already."""
        return samples[0] if samples else {}


class SingleBatches(Sequence):
    """Batches of one segment each, in order. Unlike a list of batches they take no memory.

    >>> list(SingleBatches(range(3))[1:])
    [[1], [2]]
    """

    def __init__(self, segments: range) -> None:
        self.segments = segments

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: Any) -> Any:
        found = self.segments[index]
        return SingleBatches(found) if isinstance(index, slice) else [found]


class SegmentIterator(EpochBatchIterator):
    """fairseq's iterator over :class:`StreamSegments`. Within an epoch it resumes only at the place where it stopped.

    It refuses to resume in a text that was cut into other segments.

    Args:
        segments: the segments of this process's streams. So fairseq's iterator sees one shard.
        kwargs: fairseq's arguments ``epoch``, ``num_workers`` and others.
    """

    def __init__(self, segments: StreamSegments, **kwargs: Any) -> None:
        # The batches are those of frozen_batches below.
        super().__init__(segments, segments.collater, batch_sampler=(), disable_shuffling=True, **kwargs)

    FLAGS: ClassVar = {
        "text": "the training text (--train-subset, the data folder)",
        "streams": "--batch-size times processes",
        "length": "--tokens-per-sample",
        "varied": "--variable-bptt",
        "shuffled": "--partial-shuffle",
        "overlap": "--overlap",
        "seed": "--seed, by which --variable-bptt and --partial-shuffle draw",
    }
    """The flag or data that decides each part of :attr:`StreamSegments.cut`."""
    OLDER: ClassVar = {"shuffled": False, "overlap": 1}
    """The parts that checkpoints lack from before there were these flags."""

    @property
    def frozen_batches(self) -> SingleBatches:
        """The batches of an epoch."""
        return SingleBatches(range(len(self.dataset)))

    def ordered_batches(self, _epoch: int, _fix_batches_to_gpus: bool, _shuffle: bool) -> SingleBatches:
        """Return the batches of an epoch in the order in which they are run."""
        return self.frozen_batches

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
            saved = {**self.OLDER, **saved}
            others = [key for key in self.FLAGS if saved.get(key) != cut[key]]
            if "text" in others and self.dataset.stream.has_fingerprint(saved.get("text", "")):
                others.remove("text")
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
