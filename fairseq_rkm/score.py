"""Score translations against references with fairseq-score's flags: by fairseq's own scorer, or by sacrebleu.

    python -m fairseq_rkm.score --sys OUT --ref REF
    python -m fairseq_rkm.score --sys OUT --ref REF --sacrebleu

OUT and REF hold a sentence a line. ``fairseq-score`` takes no ``--user-dir``, so that no plugin can mend it: two of its
flags fail with today's sacrebleu, and it leaves out the lines that one file has more.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from fairseq_rkm.data.text_file import texts
from fairseq_rkm.errors import RKMError

ORDER = 4
"""The longest n-grams that fairseq's scorer counts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the words after the command; None takes them from ``sys.argv``.
    """
    try:
        args = parse(arguments)
        print(args)
        for line in scores(args):
            print(line)
    except (RKMError, OSError) as error:
        sys.exit(f"fairseq-rkm: error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return fairseq-score's flags. A wrong flag ends the program with a sentence."""
    import fairseq_rkm.quiet_import  # noqa: F401  # isort: skip  before anything of fairseq
    from fairseq_cli.score import get_parser

    parser = get_parser()
    if Path(sys.argv[0]).suffix == ".py":
        parser.prog = "python -m fairseq_rkm.score"
    args: argparse.Namespace = parser.parse_args(arguments)
    if args.sacrebleu and args.sentence_bleu:
        parser.error("--sacrebleu scores the whole text and --sentence-bleu each line: give one of them")
    if not 1 <= args.order <= ORDER:
        parser.error(f"--order must be 1 to {ORDER}, not {args.order}")
    if args.sacrebleu and args.order != ORDER:
        parser.error(f"--sacrebleu counts n-grams up to {ORDER}: leave out --order or --sacrebleu")
    return args


def scores(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the report: one for the whole text, or with ``--sentence-bleu`` one a sentence.

    Raises:
        RKMError: a file is missing, is not UTF-8 or has no words, or the files differ in their number of lines.
    """
    pairs = read_pairs(args.sys, args.ref)
    if args.sacrebleu:
        import sacrebleu

        outputs, references = zip(*pairs, strict=True)
        yield sacrebleu.corpus_bleu(outputs, [references], lowercase=args.ignore_case).format()
        return
    if args.ignore_case:
        pairs = [(output.lower(), reference.lower()) for output, reference in pairs]
    counter = NgramCounter()
    for number, (output, reference) in enumerate(pairs):
        if args.sentence_bleu:
            counter.scorer.reset(one_init=True)
        counter.add(output, reference)
        if args.sentence_bleu:
            yield f"{number} {counter.result(args.order)}"
    if not args.sentence_bleu:
        yield counter.result(args.order)


def read_pairs(output: str, reference: str) -> list[tuple[str, str]]:
    """Read two files of a sentence a line.

    Args:
        output: the path of the translations, ``"-"`` for standard input.
        reference: the path of the references.

    Returns:
        Each translation with its reference, as ``(translation, reference)``.

    Raises:
        RKMError: a file is missing, is not UTF-8 or has no words, or the files differ in their number of lines.
    """
    with _open(reference) as file:
        references = list(texts(file, reference))
    if not any(line.strip() for line in references):
        raise RKMError(f"{reference} has no words: there is nothing to compare {output} with")
    name = "standard input" if output == "-" else output
    with _open(output, standard_input=True) as file:
        outputs = list(texts(file, name))
    if len(outputs) != len(references):
        raise RKMError(
            f"{name} has {len(outputs)} lines and {reference} has {len(references)}: give each translation the line of "
            "its reference"
        )
    return list(zip(outputs, references, strict=True))


def _open(path: str, standard_input: bool = False) -> contextlib.AbstractContextManager[IO[bytes]]:
    if standard_input and path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    if not Path(path).exists():
        raise RKMError(f"no file of text at {path}")
    return Path(path).open("rb")


class NgramCounter:
    """Count n-grams by fairseq's scorer, in sentences without words, too.

    Attributes:
        scorer: ``fairseq.scoring.bleu.Scorer``. It cannot take a sentence without words: it reads beyond its end.
    """

    def __init__(self) -> None:
        from fairseq.data.dictionary import Dictionary
        from fairseq.scoring import bleu

        self._words = Dictionary()
        self.scorer: Any = bleu.Scorer(
            bleu.BleuConfig(pad=self._words.pad(), eos=self._words.eos(), unk=self._words.unk())
        )
        self._never_matched = self._words.encode_line(self._words.unk_word, append_eos=False)

    def add(self, output: str, reference: str) -> None:
        """Count the n-grams of a translation, and of them those in its reference."""
        predicted, expected = self._encode(output), self._encode(reference)
        if not len(predicted):
            self.scorer.stat.reflen += len(expected)
        elif not len(expected):
            self.scorer.add(self._never_matched, predicted)
            self.scorer.stat.reflen -= len(self._never_matched)
        else:
            self.scorer.add(expected, predicted)

    def _encode(self, line: str) -> Any:
        """Return a line's words as numbers, ``(N,)`` int32, without the symbols around them that are no words."""
        words = self._words.encode_line(line, append_eos=False)
        ends = {self._words.pad(), self._words.eos()}
        kept = [place for place, word in enumerate(words.tolist()) if word not in ends]
        return words[kept[0] : kept[-1] + 1] if kept else words[:0]

    def result(self, order: int) -> str:
        """Return BLEU of n-grams up to an order, and its parts, in fairseq's form."""
        stat = self.scorer.stat
        if stat.predlen and stat.reflen:
            text: str = self.scorer.result_string(order)
            return text
        precisions = "/".join(itertools.repeat("0.0", order))
        brevity = float(stat.predlen > 0)
        return (
            f"BLEU{order} = 0.00, {precisions} (BP={brevity:.3f}, ratio=0.000, syslen={stat.predlen}, "
            f"reflen={stat.reflen})"
        )


if __name__ == "__main__":
    main()
