"""Write a corpus from Python itself: the language reference in ``pydoc_data.topics``, about 50,000 words.

    python scripts/python_reference_corpus.py FOLDER

writes train.txt, valid.txt and test.txt, a sentence a line, tokenised with sacremoses and lower-cased. Topics repeat
each other's paragraphs. Each sentence is kept once: no test sentence stands in the training text. The same Python
version writes the same bytes.
"""

import argparse
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from sacremoses import MosesTokenizer

HELD_OUT = {0: "valid", 1: "test"}
"""Of every ten topics in alphabetical order, the first goes to valid and the second to test."""

NOT_PROSE = re.compile(r"::=|>>>|^\W*$|\*{4}|={4}|-{4}")
"""Grammar productions, interpreter sessions, and underlines of headings."""


IDENTIFIERS = [r"[\w.]*_[\w.]*"]
"""Words that the tokeniser must leave in one piece."""


def sentences(text: str) -> Iterator[str]:
    """The prose of a topic, its wrapped lines joined."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = [line.strip() for line in block.splitlines() if not NOT_PROSE.search(line)]
        joined = re.sub(r'["*`|]', "", " ".join(lines)).strip()
        if len(joined.split()) >= 5:
            yield from re.split(r"(?<=[.!?])\s+(?=[A-Z])", joined)


def build(folder: Path) -> dict[str, int]:
    """Write the three splits; return their numbers of words."""
    tokenizer = MosesTokenizer("en")
    splits: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for i, name in enumerate(sorted(topics)):
        for sentence in sentences(topics[name]):
            if sentence not in seen:
                seen.add(sentence)
                line = tokenizer.tokenize(
                    sentence.lower(), escape=False, return_str=True, protected_patterns=IDENTIFIERS
                )
                splits[HELD_OUT.get(i % 10, "train")].append(line)
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: sum(len(line.split()) for line in lines) for split, lines in splits.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write train.txt, valid.txt and test.txt")
    for split, words in build(parser.parse_args().folder).items():
        print(f"{split}: {words:,} words")


if __name__ == "__main__":
    main()
