"""Classify raw text with a trained ``rkm_classifier``: one text a line in, its class and probability a line out.

    echo 'Stocks fell on Wall Street' | python -m fairseq_rkm.predict --path run/checkpoint_best.pt
    python -m fairseq_rkm.predict --path run/checkpoint_best.pt --data DATA --input texts.txt > classes.tsv

A tab separates the class and its probability. DATA is the folder that examples/document_classification/prepare.py
wrote; its files preparation.json, input0/dict.txt and label/dict.txt are enough. By default it is the checkpoint's
folder if these files are there, else the folder that training used.
"""

import argparse
import contextlib
import itertools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from fairseq_rkm.data.text_file import texts
from fairseq_rkm.errors import RKMError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: the words after the command; None takes them from ``sys.argv``.
    """
    args = parse(arguments)
    try:
        run(args)
    except (RKMError, OSError) as error:
        sys.exit(f"fairseq-rkm: error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags. A wrong flag ends the program with a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_rkm.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--path", type=Path, required=True, help="checkpoint")
    add("--data", type=Path, help="folder of the prepared data")
    add("--input", type=Path, help="file of texts (default: standard input)")
    add("--batch-size", type=int, default=64, help="texts classified at a time (default: 64)")
    add("--buffer-size", type=int, help="texts read before they are classified (default: 1024; 1 at a terminal)")
    add("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "buffer_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return args


def run(args: argparse.Namespace) -> None:
    """Classify all of the input, and print a line for each text.

    Raises:
        RKMError: the checkpoint, the data or a text cannot be used.
    """
    if args.input and not args.input.is_file():
        raise RKMError(f"no file of texts at {args.input}")
    from fairseq_rkm.models import RKMClassifier

    logging.getLogger("fairseq").setLevel(logging.WARNING)
    classifier = RKMClassifier.from_pretrained(args.path.parent, args.path.name, args.data)
    if torch.cuda.is_available() and not args.cpu:
        classifier.cuda()
    terminal = not args.input and sys.stdin.isatty()
    with _open(args.input) as lines:
        read = texts(lines, str(args.input or "standard input"))
        while chunk := list(itertools.islice(read, args.buffer_size or (1 if terminal else 1024))):
            for label, probability in classifier.predict(chunk, args.batch_size):
                print(f"{label}\t{probability:.4f}")
            sys.stdout.flush()


def _open(path: Path | None) -> contextlib.AbstractContextManager[IO[bytes]]:
    return path.open("rb") if path else contextlib.nullcontext(sys.stdin.buffer)


if __name__ == "__main__":
    main()
