"""Check binarized data before it is used: the index has to fit the data, and the data the dictionary.

A split is two files. ``NAME.bin`` holds the token numbers of all sentences, ``NAME.idx`` the place of each sentence.
Both of fairseq's layouts are known: ``mmap``, which fairseq-preprocess writes, and the older one of ``cached`` and
``lazy``. Data of other kinds passes.
"""

import bisect
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fairseq.data import Dictionary

from fairseq_rkm.data.text_file import check as check_text
from fairseq_rkm.errors import RKMError

MMAP, OLDER = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f8", 8: "u2", 9: "u4", 10: "u8"}
"""numpy's type for each of fairseq's codes. Tokens are integers."""
CHUNK = 1 << 22
"""Tokens or sentences that are checked at a time."""
BLOCKS = 256
"""Stretches of a large file that are looked at in place of all of it."""
REMEDY = "copy both files anew, or run fairseq-preprocess again"


class StoredNumbers(Sequence):
    """Numbers in a file, which are read when they are asked for.

    Args:
        path: the file.
        dtype: of the numbers.
        length: how many there are.
        offset: the bytes before them.
    """

    def __init__(self, path: Path, dtype: str, length: int, offset: int) -> None:
        self.path, self.dtype, self.length, self.offset = path, np.dtype(dtype), length, offset

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        found = range(self.length)[index]
        here = found if isinstance(index, slice) else range(found, found + 1)
        read = np.fromfile(self.path, self.dtype, len(here), offset=self.offset + here.start * self.dtype.itemsize)
        return read if isinstance(index, slice) else read[0]


class Index(NamedTuple):
    """The contents of an index of N sentences.

    Attributes:
        dtype: of the token numbers.
        sizes: ``(N,)``, the tokens of each sentence.
        starts: ``(N,)``, the bytes from the start of the data to each sentence.
        offset: a number that has been added to each token number.
    """

    dtype: np.dtype
    sizes: "np.ndarray | StoredNumbers"
    starts: "np.ndarray | StoredNumbers"
    offset: int


def check_split(prefix: str, dictionary: Dictionary | None, impl: str | None = None) -> None:
    """Check a split's two files, in one pass over its tokens.

    Args:
        prefix: the files' path up to ``.bin`` and ``.idx``. A split without either file passes.
        dictionary: of the tokens; None takes any number.
        impl: ``--dataset-impl``; None takes the files' own format.

    Raises:
        RKMError: a file is missing, empty, cut or changed, or a token is not in the dictionary.
    """
    if impl == "raw":
        if os.path.isfile(prefix):
            check_text(Path(prefix))
        return
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if impl not in (None, "mmap", "cached", "lazy") or not (data.is_file() or index.is_file()):
        return
    for path, other in ((data, index), (index, data)):
        if not path.is_file():
            raise RKMError(f"{path} is missing, beside {other.name}: {REMEDY}")
    read = read_index(index)
    if read is not None:
        check_layout(read, data, index)
        if dictionary is not None:
            check_tokens(read, data, dictionary)


def read_index(path: Path) -> Index | None:
    """Return an index; None for another layout.

    Raises:
        RKMError: the file is damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(26)
    try:
        if start[:9] == MMAP:
            return _read_mmap(path, start, size)
        if start[:8] == OLDER:
            return _read_older(np.memmap(path, mode="r"))
    except (struct.error, ValueError, OverflowError):
        raise RKMError(f"{path} is damaged: its header does not fit its {size:,} bytes; {REMEDY}") from None
    if start[:8] == b"HUFFIDX\x00":
        return None
    raise RKMError(f"{path} is damaged, or no index of fairseq's: it begins with {start[:9]!r}; {REMEDY}")


def _read_mmap(path: Path, start: bytes, size: int) -> Index:
    version, code, count = struct.unpack("<QBQ", start[9:])
    if version != 1 or code not in TYPES or size != 26 + 12 * count:
        raise ValueError
    return Index(
        np.dtype("<" + TYPES[code]),
        StoredNumbers(path, "<i4", count, 26),
        StoredNumbers(path, "<i8", count, 26 + 4 * count),
        0,
    )


def _read_older(content: np.ndarray) -> Index:
    version, code, width, count, dimensions = struct.unpack("<5Q", content[8:48].tobytes())
    dtype = np.dtype("<" + TYPES[code]) if code in TYPES else None
    # Sentences have one dimension each.
    if version != 1 or dtype is None or width != dtype.itemsize or dimensions != count:
        raise ValueError
    if len(content) != 48 + 8 * (3 * count + 2):
        raise ValueError
    dims, starts, sizes = np.split(np.frombuffer(content, "<i8", 3 * count + 2, 48), [count + 1, 2 * count + 2])
    # Multiplied and added up, numbers beyond the whole could overflow and seem to fit.
    fits = all(((part >= 0) & (part <= starts[-1])).all() for part in (starts, sizes))
    if not fits or not np.array_equal(dims, np.arange(count + 1)) or starts[-1] != sizes.sum():
        raise ValueError
    return Index(dtype, sizes, starts[:-1] * width, 1)


def spread(total: int, most: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield stretches ``(first, last + 1)`` of a row of things, in order.

    >>> list(spread(10))
    [(0, 10)]

    Args:
        total: the number of things.
        most: if there are more, there are :data:`BLOCKS` stretches of equal length, which hold about ``most`` things.
            They lie evenly spread, and the first and the last thing are in them. By default the stretches hold all.
    """
    if most is None or total <= most:
        yield from ((first, min(first + CHUNK, total)) for first in range(0, total, CHUNK))
        return
    length = most // BLOCKS
    for i in range(BLOCKS):
        first = i * (total - length) // (BLOCKS - 1)
        yield first, first + length


def check_layout(index: Index, data: Path, path: Path, most: int | None = None) -> None:
    """Refuse an index whose sentences do not follow each other and fill the data.

    Args:
        index: the index as read.
        data: the ``.bin`` file.
        path: the ``.idx`` file, for messages.
        most: look at so many sentences only, evenly spread (see :func:`spread`); by default at all.

    Raises:
        RKMError: a gap, an overlap, or data of another size.
    """
    there = data.stat().st_size
    if not len(index.sizes) or not there:
        raise RKMError(f"{data if not there else path} is empty: was there text to binarize?")
    for first, stop in spread(len(index.sizes), most):
        # One sentence more than the stretch has, so that its first is held to the one before.
        from_ = max(first - 1, 0)
        lengths = index.sizes[from_:stop].astype(np.int64) * index.dtype.itemsize
        starts = index.starts[from_:stop]
        places = np.append(starts[0] if from_ else 0, (starts + lengths)[:-1])
        wrong = np.flatnonzero((lengths < 0) | (starts != places))
        if len(wrong):
            at = from_ + int(wrong[0]) + 1
            raise RKMError(f"{path} is damaged: sentence {at:,} is not where the one before ends; {REMEDY}")
    end = int(index.starts[-1]) + int(index.sizes[-1]) * index.dtype.itemsize
    if end != there:
        raise RKMError(
            f"{data} has {there:,} bytes, and by {path.name} {end:,}: it is cut off, or one of the two is damaged or "
            f"another's; {REMEDY}"
        )


def check_tokens(index: Index, data: Path, dictionary: Dictionary) -> None:
    """Refuse token numbers that are not in the dictionary.

    Args:
        index: the index as read.
        data: the ``.bin`` file.
        dictionary: of the tokens.

    Raises:
        RKMError: sentence and token of the first wrong number.
    """
    check_dtype(index, data)
    tokens = np.memmap(data, dtype=index.dtype, mode="r")
    for first, stop in spread(len(tokens)):
        check_range(tokens[first:stop], first, index.offset, data, len(dictionary))


def check_dtype(index: Index, data: Path) -> None:
    """Raise RKMError if the index's tokens are no whole numbers."""
    if index.dtype.kind == "f":
        raise RKMError(f"{data.with_suffix('.idx')} is damaged: tokens are whole numbers, not {index.dtype}; {REMEDY}")


def check_range(tokens: np.ndarray, first: int, offset: int, data: Path, types: int) -> None:
    """Refuse token numbers that are not in the dictionary.

    Args:
        tokens: ``(N,)``, a stretch of the data as it is stored.
        first: the place in the data of the stretch's first token, from 0.
        offset: a number that has been added to each token number.
        data: the ``.bin`` file.
        types: the number of the dictionary's entries.

    Raises:
        RKMError: sentence and token of the first wrong number.
    """
    low, high = offset, types - 1 + offset
    if not len(tokens) or (tokens.min() >= low and tokens.max() <= high):
        return
    wrong = int(np.flatnonzero((tokens < low) | (tokens > high))[0])
    raise RKMError(
        f"{data}, {place(data, first + wrong)} is number {int(tokens[wrong]) - offset}, and the dictionary has 0 to "
        f"{types - 1}: give the dict.txt that the data was binarized with; if it is that, the data is damaged, so run "
        "fairseq-preprocess again"
    )


def place(data: Path, at: int) -> str:
    """Return the place of a token in words, for messages.

    Args:
        data: the ``.bin`` file.
        at: the token's place in it, from 0.
    """
    index = read_index(data.with_suffix(".idx"))
    if index is None:
        return f"token {at + 1:,}"
    sentence = bisect.bisect_right(index.starts, at * index.dtype.itemsize)
    token = at - int(index.starts[sentence - 1]) // index.dtype.itemsize + 1
    return f"sentence {sentence:,}: token {token:,}"
