"""A corpus as one stream of tokens, cut into parallel streams and these into segments that follow each other."""

import math

import torch
from fairseq.data import FairseqDataset
from torch import Tensor

from fairseq_rkm.errors import RKMError


class TokenStream(FairseqDataset):
    """All tokens of a split, in order, end-of-sentence symbols included.

    Args:
        tokens: ``(N,)`` int64.
        eos: the symbol that the first token is predicted from.
        name: what an error calls the split.
    """

    def __init__(self, tokens: Tensor, eos: int, name: str) -> None:
        self.tokens, self.eos, self.name = tokens, eos, name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> int:
        return int(self.tokens[index])

    def check_streams(self, streams: int) -> None:
        """Raises RKMError if there are fewer tokens than streams."""
        if len(self) < streams:
            raise RKMError(
                f"the split {self.name!r} has {len(self)} tokens, fewer than the {streams} parallel streams "
                "(--batch-size times processes) that it is to be cut into: use a smaller --batch-size or more text"
            )


class StreamSegments(FairseqDataset):
    """The segments of some of a corpus's parallel streams; item k is the k-th segment of all of them.

    The N tokens are cut into ``streams`` stretches, the first ``N mod streams`` of them one token longer. Every token
    is a target once. A stretch's first token is predicted from the token before it in the corpus (the corpus's first
    from the end-of-sentence symbol), with a zero state.

    Args:
        stream: the corpus.
        streams: the number of stretches.
        rows: which of them are here, as ``(first, last + 1)``: a data-parallel rank's.
        length: tokens in a segment; the last may be shorter.
        pad: fills the last segment's last column in rows whose stretch is the shorter.
    """

    def __init__(self, stream: TokenStream, streams: int, rows: tuple[int, int], length: int, pad: int) -> None:
        stream.check_streams(streams)
        self.length = length
        quotient, longer = divmod(len(stream), streams)
        lengths = torch.full((streams,), quotient)
        lengths[:longer] += 1
        starts = lengths.cumsum(0) - lengths
        columns = torch.arange(int(lengths.max()))
        here = slice(*rows)
        index = starts[here].unsqueeze(1) + columns
        real = columns < lengths[here].unsqueeze(1)
        before = torch.cat([torch.tensor([stream.eos]), stream.tokens])
        index = index.clamp(max=len(stream) - 1)
        self.source = before[index].masked_fill(~real, pad)
        self.target = stream.tokens[index].masked_fill(~real, pad)
        self.first_row = rows[0]
        self.pad = pad

    def __len__(self) -> int:
        return math.ceil(self.source.size(1) / self.length)

    def __getitem__(self, index: int) -> dict:
        columns = slice(index * self.length, (index + 1) * self.length)
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
        """A segment is a batch by itself."""
        return samples[0] if samples else {}
