"""The tokens of a split in order, read a stretch at a time from the files where fairseq-preprocess wrote them.

A ``.bin`` file holds all tokens of its sentences one after the other. So a stretch of the text is a stretch of the
file, and nothing of a corpus has to be in memory but the stretch that is wanted.
"""

import os
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Optional, Protocol

import numpy as np
from torch import Tensor

from fairseq_rkm.data.indexed_check import REMEDY, Index, check_dtype, check_layout, check_range, spread
from fairseq_rkm.errors import RKMError

SAMPLE = 1 << 24
"""The most tokens that are checked when a file is opened."""
SENTENCES = 1 << 20
"""The most sentences whose places are checked then. They decide nothing: a stream does not stop at a sentence's end."""


class Tokens(Protocol):
    """All tokens of a text, in order."""

    def __len__(self) -> int: ...

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens from ``first`` to ``stop - 1``, ``(stop - first,)`` int64."""


class HeldTokens:
    """Tokens in memory.

    Args:
        tokens: ``(N,)``, of any type of whole numbers.
    """

    def __init__(self, tokens: np.ndarray | Tensor) -> None:
        self.tokens = tokens.numpy() if isinstance(tokens, Tensor) else tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens from ``first`` to ``stop - 1``, ``(stop - first,)`` int64."""
        return self.tokens[first:stop].astype(np.int64)


class StoredTokens:
    """Tokens in a ``.bin`` file. Each stretch is read from the file when it is asked for, and checked then.

    The file is read, not mapped to memory. Pages of a map would count as the process's memory, and a file that is cut
    off while it is mapped would kill the process.

    Args:
        index: the contents of the file's index.
        data: the file.
        types: the number of the dictionary's entries.

    Raises:
        RKMError: the index does not fit the file, or a token is not in the dictionary. Of more than :data:`SAMPLE`
            tokens so many are looked at, evenly spread. The others are looked at when they are read.
    """

    def __init__(self, index: Index, data: Path, types: int) -> None:
        check_dtype(index, data)
        check_layout(index, data, data.with_suffix(".idx"), SENTENCES)
        self.data, self.types = data, types
        self.dtype, self.offset = index.dtype, index.offset
        self.count = data.stat().st_size // index.dtype.itemsize
        self.file: Optional[IO[bytes]] = None
        for first, stop in spread(len(self), SAMPLE):
            self.stored(first, stop)

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out: processes that load data open their own."""
        return {**self.__dict__, "file": None}

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens from ``first`` to ``stop - 1``, ``(stop - first,)`` int64.

        Raises:
            RKMError: a token is not in the dictionary, or the file is shorter than it was.
        """
        tokens = self.stored(first, stop).astype(np.int64)
        return tokens - self.offset if self.offset else tokens

    def stored(self, first: int, stop: int) -> np.ndarray:
        """Return a stretch as it is stored, after the checks of :meth:`read`."""
        if self.file is None:
            self.file = open(self.data, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        width = self.dtype.itemsize
        content, wanted = b"", (stop - first) * width
        while len(content) < wanted:
            # Unlike a seek this is safe in processes that share the file.
            part = os.pread(self.file.fileno(), wanted - len(content), first * width + len(content))
            if not part:
                raise RKMError(
                    f"{self.data} is shorter than when it was opened: did another command write it? {REMEDY}"
                )
            content = content + part if content else part
        tokens = np.frombuffer(content, self.dtype)
        check_range(tokens, first, self.offset, self.data, self.types)
        return tokens


class JoinedTokens:
    """Texts that follow each other.

    Args:
        parts: the texts, at least one.
    """

    def __init__(self, parts: list[Tokens]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, first: int, stop: int) -> np.ndarray:
        """Return the tokens from ``first`` to ``stop - 1``, ``(stop - first,)`` int64."""
        pieces = [np.empty(0, np.int64)]
        for part, end in zip(self.parts, self.ends, strict=True):
            start = end - len(part)
            if first < end and stop > start:
                pieces.append(part.read(max(first - start, 0), min(stop, end) - start))
        return np.concatenate(pieces)
