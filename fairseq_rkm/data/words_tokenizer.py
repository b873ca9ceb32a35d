"""``--tokenizer words``: a token is a run of letters and digits, or any other single mark."""

import re

from fairseq.data.encoders import register_tokenizer
from fairseq.dataclass import FairseqDataclass


@register_tokenizer("words", dataclass=FairseqDataclass)
class WordsTokenizer:
    """Cut text into words as most work on text classification does.

    The tokens are the same whether or not a text's punctuation had spaces around it: Moses's rules lack this property.
    Sentences without a space between them are parted, too.

    >>> WordsTokenizer().encode("in 1941.The film")
    'in 1941 . The film'
    """

    _TOKEN = re.compile(r"\w+|[^\w\s]")

    def __init__(self, *_unused: object) -> None:
        pass

    def encode(self, x: str) -> str:
        """Return a text's tokens, separated by spaces."""
        return " ".join(self._TOKEN.findall(x))

    def decode(self, x: str) -> str:
        """Return tokens as they are: it is not known where a text had no space."""
        return x
