"""The order in which parallel streams read a text: once or several times over, each from its start or from within.

All of it is arithmetic of places: no token is read or copied here.
"""

import math
from collections.abc import Iterator

import numpy as np

from fairseq_rkm.errors import RKMError


class Passes:
    """A text that is read ``count`` times over, one pass after the other, as one long text.

    Pass i begins i / count of a segment later than the first, and reads what it left out at its end. So each token is
    read once a pass. Segments of one length, cut from the long text's start, then begin at ``count`` evenly spread
    places of the text: two tokens between which one pass ends a segment stand within a segment in the others (Kocher
    et al. 2019, *Alleviating Sequence Information Loss with Data Overlapping and Prime Batch Sizes*).

    >>> [list(range(first, stop)) for first, stop in Passes(tokens=4, count=2, length=2).places(0, 8)]
    [[0, 1, 2, 3], [1, 2, 3], [0]]

    Args:
        tokens: the text's tokens, at least 1.
        count: passes, at least 1.
        length: tokens in a segment.
    """

    def __init__(self, tokens: int, count: int = 1, length: int = 1) -> None:
        self.tokens, self.count = tokens, count
        # A pass of the long text begins where segments of the one before it have got to.
        self.begins = [(i * tokens + i * length // count) % length % tokens for i in range(count)]

    def __len__(self) -> int:
        return self.count * self.tokens

    def places(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches ``(first, stop)`` of the text that ``first`` to ``stop - 1`` of the long text are."""
        while first < stop:
            number, at = divmod(first, self.tokens)
            place = (at + self.begins[number]) % self.tokens
            count = min(stop - first, self.tokens - at, self.tokens - place)
            yield place, place + count
            first += count


class Streams:
    """A long text, cut into parallel streams, each of them a stretch of it.

    Streams have whole units of tokens. The first have one unit more than the last, if they do not come out even, and
    the very last unit may be shorter. With a seed each stream is rotated: it begins at a unit within it, goes on to its
    end, and then from its start to where it began (Press 2019, *Partially Shuffling the Training Data to Improve
    Language Models*). All streams' rotations are drawn together, whoever reads them.

    >>> streams = Streams(Passes(7), count=2)
    >>> streams.sizes, [list(streams.places(row, 0, streams.sizes[row])) for row in range(2)]
    ([4, 3], [[(0, 4)], [(4, 7)]])

    Args:
        text: the long text.
        count: streams.
        unit: tokens in a unit.
        seed: a run's seed and the epoch, both from 0, for rotations; None for no rotation.

    Attributes:
        sizes: the tokens of each stream; none has more than the first.

    Raises:
        RKMError: there are fewer units than streams.
    """

    def __init__(self, text: Passes, count: int, unit: int = 1, seed: tuple[int, int] | None = None) -> None:
        self.text = text
        units = -(-len(text) // unit)
        if units < count:
            raise RKMError(
                f"{text.count} passes over {text.tokens} tokens are {units} segments of {unit} tokens, fewer than the "
                f"{count} parallel streams (--batch-size times processes): use a smaller --batch-size or more text"
            )
        quotient, longer = divmod(units, count)
        rows = np.arange(count)
        first = unit * (rows * quotient + np.minimum(rows, longer))
        whole = quotient + (rows < longer)
        self.firsts: list[int] = first.tolist()
        self.sizes: list[int] = np.minimum(unit * whole, len(text) - first).tolist()
        self.shifts = [0] * count
        if seed is not None:
            # The last number keeps these draws apart from the lengths', which have the same seed and epoch.
            self.shifts = (unit * np.random.default_rng((*seed, 1)).integers(0, whole)).tolist()

    def places(self, row: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches ``(first, stop)`` of the text that a stream's ``first`` to ``stop - 1`` tokens are."""
        begin, size, shift = self.firsts[row], self.sizes[row], self.shifts[row]
        while first < stop:
            at = (first + shift) % size
            count = min(stop - first, size - at)
            yield from self.text.places(begin + at, begin + at + count)
            first += count


def check_overlap(overlap: int, streams: int, length: int) -> None:
    """Refuse a number of passes that streams or segments do not go with.

    >>> check_overlap(7, streams=80, length=70)
    >>> check_overlap(4, streams=80, length=70)
    Traceback (most recent call last):
    fairseq_rkm.errors.RKMError: --overlap 4 and the 80 parallel streams (--batch-size times processes) share the factor
    4, so that 4 streams would read the same place at a time: use 79 or 81 streams, or another --overlap

    Args:
        overlap: passes over the text.
        streams: parallel streams of all processes.
        length: tokens in a segment.

    Raises:
        RKMError: both numbers have a common factor, or a segment has fewer tokens than there are passes.
    """
    if overlap > length:
        raise RKMError(
            f"--overlap {overlap} spreads so many passes over the places of a segment, which has --tokens-per-sample "
            f"{length}: make --overlap at most {length}"
        )
    factor = math.gcd(overlap, streams)
    if factor > 1:
        near = sorted(
            (n for n in range(1, 2 * streams + 2) if math.gcd(overlap, n) == 1), key=lambda n: abs(n - streams)
        )
        raise RKMError(
            f"--overlap {overlap} and the {streams} parallel streams (--batch-size times processes) share the factor "
            f"{factor}, so that {factor} streams would read the same place at a time: use "
            f"{' or '.join(map(str, sorted(near[:2])))} streams, or another --overlap"
        )
