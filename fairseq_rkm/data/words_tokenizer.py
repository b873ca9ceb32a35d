"""``--tokenizer words``: runs of letters and digits, and each other mark by itself."""

import re

from fairseq.data.encoders import register_tokenizer
from fairseq.dataclass import FairseqDataclass


@register_tokenizer("words", dataclass=FairseqDataclass)
class WordsTokenizer:
    """What counts as a word in most text classification.

    Unlike Moses's rules these come to the same tokens whether or not a text's punctuation had been spaced before, and
    part sentences without a space between them: ``"in 1941.The film"``.
    """

    _TOKEN = re.compile(r"\w+|[^\w\s]")

    def __init__(self, *_unused: object) -> None:
        pass

    def encode(self, x: str) -> str:
        """Text to tokens separated by spaces."""
        return " ".join(self._TOKEN.findall(x))

    def decode(self, x: str) -> str:
        """Tokens as they are: where there was no space is not known."""
        return x
