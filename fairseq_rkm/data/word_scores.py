"""Scores of subwords put together to scores of words, over a whole text however it was cut into samples."""

from typing import NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_rkm.errors import RKMError

SPACE = "\u2581"
"""How a piece of sentencepiece's begins that begins a word."""
MARKS = {"@@ ": "@@", "subword_nmt": "@@"}
"""The values of ``--post-process`` for which a subword that does not end a word ends in a mark, and the mark."""


class Sample(NamedTuple):
    """A scored sample.

    Attributes:
        id: its place in the text; samples of one ``id`` follow each other in the order in which they were scored.
        tokens: ``(N,)`` int64.
        scores: ``(N,)`` float32, the logarithm of each token's probability.
    """

    id: int
    tokens: Tensor
    scores: Tensor


class Word(NamedTuple):
    """A word; a token where subwords are not put together.

    Attributes:
        text: its tokens, without marks.
        score: the logarithm of its probability.
        pieces: how many tokens it was made of.
        sample: the place, among the samples in the order of the text, of the one in which it ends.
    """

    text: str
    score: float
    pieces: int
    sample: int


class WordScores:
    """The words of a text and their scores.

    Args:
        dictionary: of the tokens.
        post_process: how words were cut into subwords: a key of :data:`MARKS` or ``sentencepiece``; None or ``none``:
            each token is a word.

    Raises:
        RKMError: another value.
    """

    def __init__(self, dictionary: Dictionary, post_process: str | None) -> None:
        known = ("sentencepiece", *MARKS)
        self.joins = post_process not in (None, "none")
        if self.joins and post_process not in known:
            raise RKMError(
                f"--post-process {post_process!r}: there is perplexity of words for {', '.join(map(repr, known))}; "
                "without the flag it is that of tokens"
            )
        self.dictionary, self.mark = dictionary, MARKS.get(post_process or "", "")
        symbols = dictionary.symbols
        self.unfinished = torch.tensor([self.joins and symbol.endswith(self.mark) for symbol in symbols])
        self.continues = torch.tensor([bool(self.mark) or not symbol.startswith(SPACE) for symbol in symbols])
        # No word goes beyond its sentence.
        self.unfinished[dictionary.eos()] = self.continues[dictionary.eos()] = False
        self.samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Take a sample; in any order but for those of one ``id``."""
        self.samples.append(sample)

    def sort(self) -> None:
        """Put the samples in the order of the text.

        Raises:
            RKMError: words are to be put together, and samples are missing in which some may go on.
        """
        self.samples.sort(key=lambda sample: sample.id)  # keeps the order of those of one id
        if not self.joins or not self.samples:
            return
        ids = sorted({sample.id for sample in self.samples})
        ends = [int(sample.tokens[-1]) for sample in self.samples if len(sample.tokens)]
        whole = ids == list(range(len(ids))) and not self.unfinished[ends[-1:]].any()
        if not whole and any(end != self.dictionary.eos() for end in ends):
            raise RKMError(
                "--post-process: words go on in samples that are not here. Evaluate the whole text: without "
                "--num-shards, in one process, and in samples that the model takes (--tokens-per-sample)"
            )

    def tokens(self) -> Tensor:
        """All tokens, ``(N,)`` int64."""
        return torch.cat([sample.tokens for sample in self.samples]) if self.samples else torch.empty(0).long()

    def scores(self) -> Tensor:
        """The score of each, ``(N,)`` float64."""
        return torch.cat([sample.scores.double() for sample in self.samples]) if self.samples else torch.empty(0)

    def number(self, tokens: Tensor) -> Tensor:
        """The number of the word, from 0, that each of N tokens belongs to, ``(N,)`` int64."""
        joined = self.unfinished[tokens[:-1]] & self.continues[tokens[1:]]
        return torch.cat([torch.zeros(min(1, len(tokens))).long(), (~joined).cumsum(0)])

    def words(self) -> list[Word]:
        """All words, in the order of the text."""
        tokens, scores = self.tokens(), self.scores()
        pieces = self.number(tokens).bincount()
        totals = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, self.number(tokens), scores)
        ends = pieces.cumsum(0)
        lengths = torch.tensor([len(sample.tokens) for sample in self.samples])
        samples = torch.bucketize(ends - 1, lengths.cumsum(0), right=True)
        rows = zip(tokens.split(pieces.tolist()), totals.tolist(), pieces.tolist(), samples.tolist(), strict=True)
        return [Word(self.text(part), score, count, sample) for part, score, count, sample in rows]

    def text(self, tokens: Tensor) -> str:
        """A word without its marks, but for a last one, after which its sentence ends."""
        *first, last = (self.dictionary[token] for token in tokens.tolist())
        return "".join(symbol.removesuffix(self.mark) for symbol in first) + last
