"""Classify raw text or recordings with a trained ``rkm_classifier`` or ``rkm_signal_classifier``.

    echo 'Stocks fell on Wall Street' | python -m fairseq_rkm.predict --path run/checkpoint_best.pt
    python -m fairseq_rkm.predict --path run/checkpoint_best.pt --data DATA --input texts.txt > classes.tsv
    python -m fairseq_rkm.predict --path run/checkpoint_best.pt recordings.npz > classes.tsv

A line of the output is of one text or recording: class, tab, probability. With --windows a line is of one window of a
recording, and the recording's number and the window's start in seconds (steps, where the sampling rate is unknown)
follow. DATA is the folder that prepare.py wrote. Its files preparation.json, input0/dict.txt and label/dict.txt are
enough for texts, and signals.json for recordings. By default it is the checkpoint's folder if these files are there,
else the folder that training used.
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
    add("recordings", type=Path, nargs="?", metavar="FILE", help="recordings: .npz, .npy, .csv, .ts or -epo.fif")
    add("--path", type=Path, required=True, help="checkpoint")
    add("--data", type=Path, help="folder of the prepared data")
    add("--input", type=Path, help="file of texts (default: standard input)")
    add("--windows", action="store_true", help="a line for each window of the recordings")
    add("--rate", type=float, help="samples a second of the recordings, where the file does not tell")
    add("--batch-size", type=int, default=64, help="texts or windows classified at a time (default: 64)")
    add("--buffer-size", type=int, help="texts read before they are classified (default: 1024; 1 at a terminal)")
    add("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args(arguments)
    for name in ("batch_size", "buffer_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.recordings is None and (args.windows or args.rate is not None):
        parser.error("--windows and --rate are for recordings: give their FILE")
    if args.recordings is not None and (args.input is not None or args.buffer_size is not None):
        parser.error("--input and --buffer-size are for texts: a FILE of recordings is read whole")
    return args


def run(args: argparse.Namespace) -> None:
    """Classify all of the input, and print a line for each text, recording or window.

    Raises:
        RKMError: the checkpoint, the data, a text or a recording cannot be used.
    """
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    if args.recordings is None:
        classify_texts(args)
    else:
        classify_recordings(args)


def classify_texts(args: argparse.Namespace) -> None:
    """Print a line for each text of the input."""
    if args.input and not args.input.is_file():
        raise RKMError(f"no file of texts at {args.input}")
    from fairseq_rkm.models import RKMClassifier

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


def classify_recordings(args: argparse.Namespace) -> None:
    """Print a line for each recording of the file, or for each window."""
    from fairseq_rkm.data.signals import read_signals
    from fairseq_rkm.models import RKMSignalClassifier

    recordings = read_signals(args.recordings)
    if args.rate is not None:
        if not args.rate > 0:
            raise RKMError(f"--rate must be above 0, not {args.rate:g}")
        if recordings.rate is not None and recordings.rate != args.rate:
            raise RKMError(f"{args.recordings} has {recordings.rate:g} samples a second, not --rate {args.rate:g}")
        recordings.rate = args.rate
    classifier = RKMSignalClassifier.from_pretrained(args.path.parent, args.path.name, args.data)
    if torch.cuda.is_available() and not args.cpu:
        classifier.cuda()
    if not args.windows:
        for label, probability in classifier.predict(recordings, args.batch_size):
            print(f"{label}\t{probability:.4f}")
        return
    windows = classifier.windows(recordings, args.batch_size)
    rate = classifier.preparation.rate or 1
    for number, start, row in zip(*windows, strict=True):
        k = int(row.argmax())
        print(f"{classifier.classes[k]}\t{row[k]:.4f}\t{number + 1}\t{start / rate:g}")


def _open(path: Path | None) -> contextlib.AbstractContextManager[IO[bytes]]:
    return path.open("rb") if path else contextlib.nullcontext(sys.stdin.buffer)


if __name__ == "__main__":
    main()
