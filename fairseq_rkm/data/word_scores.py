"""Join scores of subwords to scores of words, over a whole text, in any division into samples."""

from typing import NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor

from fairseq_rkm.errors import RKMError

SPACE = "\u2581"
"""The first character of a sentencepiece piece at the start of a word."""
MARKS = {"@@ ": "@@", "subword_nmt": "@@"}
"""Marks at the end of subwords that do not end their word, by value of ``--post-process``."""


class Sample(NamedTuple):
    """A scored sample of N tokens.

    Attributes:
        id: its place in the text. Samples of one ``id`` follow each other in the order of scoring.
        tokens: ``(N,)`` int64.
        scores: ``(N,)`` float32, the natural logarithm of each token's probability.
    """

    id: int
    tokens: Tensor
    scores: Tensor


class Word(NamedTuple):
    """A word. Without joining of subwords, each token is a word.

    Attributes:
        text: its tokens joined, without marks.
        score: the natural logarithm of its probability.
        pieces: the number of its tokens.
        sample: the number of the sample with its last token, from 0, in the order of the text.
    """

    text: str
    score: float
    pieces: int
    sample: int


class WordScores:
    """The words of a text and their scores.

    >>> scores = WordScores(dictionary, "@@ ")
    >>> tokens = torch.tensor([dictionary.index("cel@@"), dictionary.index("lo")])
    >>> scores.add(Sample(0, tokens, torch.tensor([-2.0, -0.5])))
    >>> scores.words()
    [Word(text='cello', score=-2.5, pieces=2, sample=0)]

    Args:
        dictionary: of the tokens.
        post_process: how words were cut into subwords: a key of :data:`MARKS` or ``"sentencepiece"``. With None or
            ``"none"`` each token is a word.

    Raises:
        RKMError: another value of ``post_process``.
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
        """Take a sample. Only samples of one ``id`` have to come in order."""
        self.samples.append(sample)

    def sort(self) -> None:
        """Put the samples in the order of the text.

        Raises:
            RKMError: subwords are to be joined, and a sample is missing, so that a word may lack its end.
        """
        self.samples.sort(key=lambda sample: sample.id)  # samples of one id keep their order
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
        """Return all tokens, ``(N,)`` int64."""
        return torch.cat([sample.tokens for sample in self.samples]) if self.samples else torch.empty(0).long()

    def scores(self) -> Tensor:
        """Return the score of each token, ``(N,)`` float64."""
        return torch.cat([sample.scores.double() for sample in self.samples]) if self.samples else torch.empty(0)

    def number(self, tokens: Tensor) -> Tensor:
        """Return the number of each token's word, from 0, ``(N,)`` int64."""
        joined = self.unfinished[tokens[:-1]] & self.continues[tokens[1:]]
        return torch.cat([torch.zeros(min(1, len(tokens))).long(), (~joined).cumsum(0)])

    def words(self) -> list[Word]:
        """Return all words, in the order of the text."""
        tokens, scores = self.tokens(), self.scores()
        pieces = self.number(tokens).bincount()
        totals = torch.zeros(len(pieces), dtype=torch.float64).index_add_(0, self.number(tokens), scores)
        ends = pieces.cumsum(0)
        lengths = torch.tensor([len(sample.tokens) for sample in self.samples])
        samples = torch.bucketize(ends - 1, lengths.cumsum(0), right=True)
        rows = zip(tokens.split(pieces.tolist()), totals.tolist(), pieces.tolist(), samples.tolist(), strict=True)
        return [Word(self.text(part), score, count, sample) for part, score, count, sample in rows]

    def text(self, tokens: Tensor) -> str:
        """Return a word's text. Marks are removed, except one on the last token: its sentence ends there."""
        *first, last = (self.dictionary[token] for token in tokens.tolist())
        return "".join(symbol.removesuffix(self.mark) for symbol in first) + last
