"""Labelled documents in CSV files to the binarized layout of fairseq's task ``sentence_prediction``.

    python examples/document_classification/prepare.py --train train.csv --lowercase --out runs/news/data

A row holds a class and one or more fields of text (Zhang et al. 2015), or has a header whose columns --columns names;
files may end in .xz or .gz. ``--out`` gets
input0 and label (``fairseq-preprocess``) and preparation.json. ``python -m fairseq_rkm.predict`` reads the latter and
turns new text into tokens in the same way. Training and validation documents are sorted by length. With
``fairseq-train --no-shuffle`` a batch's documents are then about equally long; the order of the batches is still drawn
anew each epoch. Test documents keep their file's order.
"""

import argparse
import collections
import io
import logging
import multiprocessing
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from fairseq import options
from fairseq.data import Dictionary
from fairseq_cli import preprocess

from fairseq_rkm import RKMError, register
from fairseq_rkm.data.labelled_csv import BrokenRow, Document, read_rows
from fairseq_rkm.data.preparation import SENTENCEPIECE_MODEL, TOKENIZERS, Preparation
from fairseq_rkm.data.text_file import texts

HEADINGS = {"label", "labels", "class", "category", "target", "sentiment", "topic", "rating", "stars", "intent", "tag"}
"""Words by which a first row is known for a header, if no other row has this class."""

FIELDS = "Is the class the first field? Else name them: --columns CLASS,TEXT, and --delimiter for what is between"

ENOUGH = 20
"""The fewest documents of which more than half cannot have a class of their own."""

SHOWN = 10
"""The most broken rows of a file that an error lists."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    try:
        prepare(args)
    except RKMError as error:
        sys.exit(f"prepare: error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="CSV file of training documents")
    add("--test", type=Path, help="CSV file of test documents")
    add("--valid", type=Path, help="CSV file of validation documents, in place of a part of the training file")
    add("--valid-fraction", type=float, default=0.05, help="part of the training file to validate on (default: 0.05)")
    add("--out", type=Path, required=True, metavar="DATA", help="folder to write; must not be there yet")
    add("--columns", type=lambda text: [name.strip() for name in text.split(",")], metavar="CLASS,TEXT,...",
        help="names in the files' first rows, or numbers from 1 (default: the class first, then text)")  # fmt: skip
    add("--delimiter", help="between fields (default: a tab for .tsv, else a comma)")
    add("--classes", type=Path, help="file of class names, one a line; the files' classes are then numbers from 1")
    add("--tokenizer", choices=TOKENIZERS, default="moses",
        help="moses (default), words (runs of letters and digits, other marks), space for tokenised text")  # fmt: skip
    add("--language", default="en", help="whose rules the tokenizer follows (default: en)")
    add("--sentencepiece", type=int, metavar="PIECES", help="learn so many pieces, in place of a tokenizer")
    add("--lowercase", action="store_true", help="drop case")
    add("--ascii", action="store_true", help="drop accents, and what is not ASCII without them")
    add("--min-count", type=int, default=2, help="words seen less often in training become <unk> (default: 2)")
    add("--max-words", type=int, default=0, help="keep only so many, the most frequent (default: all)")
    add("--skip-broken", action="store_true", help="go on without rows that are no labelled documents")
    add("--seed", type=int, default=1, help="of the validation split (default: 1)")
    add("--workers", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args(arguments)
    if args.columns and (len(args.columns) < 2 or "" in args.columns):
        parser.error("--columns takes the class's column and the text's: --columns label,text or --columns 2,1")
    args.delimiter = {"\\t": "\t", "tab": "\t"}.get(args.delimiter, args.delimiter)
    if args.delimiter and (len(args.delimiter) != 1 or args.delimiter in '"\r\n'):
        parser.error(f"--delimiter must be one character (or tab), not {args.delimiter!r}")
    if args.valid is None and not 0 < args.valid_fraction < 1:
        parser.error(f"--valid-fraction must lie within (0, 1), not be {args.valid_fraction}")
    return args


def prepare(args: argparse.Namespace) -> None:
    """Read, tokenise and binarize all splits; ``--out`` appears only when it is whole.

    Raises:
        RKMError: a file cannot be used, or ``--out`` is there already.
    """
    register()
    if args.out.exists():
        raise RKMError(f"{args.out} is there already: delete it, or give another --out")
    names = _class_names(args.classes) if args.classes else None
    files = {"train": args.train, "valid": args.valid, "test": args.test}
    given = {
        split: read_documents(path, args.skip_broken, args.columns, args.delimiter)
        for split, path in files.items()
        if path
    }
    classes = classes_of(given["train"], names)
    for split, documents in given.items():
        given[split] = drop_unknown(documents, classes, files[split], args.skip_broken)
    splits = given if args.valid else hold_out(given, args.valid_fraction, args.seed)
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    preparation = Preparation(
        names or classes, args.tokenizer, args.language, args.lowercase, args.ascii, bool(args.sentencepiece), partial
    )
    if args.sentencepiece:
        learn_pieces(preparation, splits["train"], args.sentencepiece, args.seed)
    tokens = {split: tokenize(preparation, documents, args.workers) for split, documents in splits.items()}
    write_text(partial, splits, tokens, classes)
    binarize(partial, list(splits), args)
    shutil.rmtree(partial / "text")
    preparation.save()
    partial.rename(args.out)
    types = len((args.out / "input0" / "dict.txt").read_text(encoding="utf-8").splitlines())
    for split, lines in tokens.items():
        words = sum(len(line.split()) for line in lines)
        print(f"{split}: {len(lines):,} documents, {words:,} tokens, {words / len(lines):.1f} each")
    print(f"dictionary: {types:,} types; {len(classes)} classes: {', '.join(preparation.classes)}")


def _class_names(path: Path) -> list[str]:
    if not path.is_file():
        raise RKMError(f"no file of class names at {path}")
    with path.open("rb") as lines:
        return [line.strip() for line in texts(lines, str(path)) if line.strip()]


def read_documents(
    path: Path, skip_broken: bool, columns: list[str] | None = None, delimiter: str | None = None
) -> list[Document]:
    """Read a file's documents, and name its broken rows.

    Args:
        path: the file.
        skip_broken: whether to go on without broken rows.
        columns: as :func:`fairseq_rkm.data.labelled_csv.read_rows` takes them.
        delimiter: likewise.

    Raises:
        RKMError: a row is broken and ``skip_broken`` is False, or the file has no documents.
    """
    documents: list[Document] = []
    broken: list[BrokenRow] = []
    for row in read_rows(path, columns, delimiter):
        (documents if isinstance(row, Document) else broken).append(row)  # type: ignore[arg-type]
    if reason := _why_a_header(documents):
        header = documents.pop(0)
        broken.insert(0, BrokenRow(header.line, f"class {header.label!r}, {reason}: a header? (--columns CLASS,TEXT)"))
    report_broken(path, broken, skip_broken)
    if not documents:
        raise RKMError(f"{path} has no labelled documents")
    return documents


def _why_a_header(documents: list[Document]) -> str | None:
    """Return why the first row looks like a header; None if it does not."""
    first, others = documents[:1], documents[1:]
    if not others or any(other.label == first[0].label for other in others):
        return None
    if not first[0].label.isdecimal() and all(other.label.isdecimal() for other in others):
        return "where all others are numbers"
    words = len(first[0].text.split())
    is_short = words < min(4, *(len(other.text.split()) for other in others))
    if is_short or not HEADINGS.isdisjoint(re.findall("[a-z]+", first[0].label.lower())):
        return "which no other row has"
    return None


def report_broken(path: Path, broken: list[BrokenRow], skip: bool) -> None:
    """Print broken rows if they are skipped; else raise RKMError."""
    if not broken:
        return
    listed = "".join(f"\n  line {row.line}: {row.reason}" for row in broken[:SHOWN])
    more = f"\n  and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
    text = f"{path}: {len(broken):,} broken rows:{listed}{more}"
    if not skip:
        raise RKMError(f"{text}\nCorrect them, or leave them out with --skip-broken")
    print(f"left out of {text}", file=sys.stderr)


def classes_of(documents: list[Document], names: list[str] | None) -> list[str]:
    """The classes in the files' words and in order.

    Numbers are ordered by size and other classes by name. With K ``names`` the classes are 1 to K.

    Raises:
        RKMError: there are fewer than two classes, or so many that they are texts.
    """
    counts = collections.Counter(document.label for document in documents)
    if names:
        return [str(k) for k in range(1, len(names) + 1)]
    if len(counts) < 2:
        raise RKMError(f"all training documents are of the class {next(iter(counts))!r}. {FIELDS}")
    if len(documents) >= ENOUGH and len(counts) > len(documents) / 2:
        raise RKMError(
            f"{len(counts):,} classes for {len(documents):,} training documents, {next(iter(counts))[:20]!r}... among "
            f"them. {FIELDS}"
        )
    numbers = all(label.isdecimal() for label in counts)
    return sorted(counts, key=lambda label: (int(label), label) if numbers else (0, label))


def drop_unknown(documents: list[Document], classes: list[str], path: Path, skip_broken: bool) -> list[Document]:
    """Keep the documents of known classes.

    Raises:
        RKMError: a class is unknown and ``skip_broken`` is False, or no document is left.
    """
    known = set(classes)
    shown = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    report_broken(
        path,
        [
            BrokenRow(document.line, f"class {document.label!r} is none of {shown}")
            for document in documents
            if document.label not in known
        ],
        skip_broken,
    )
    kept = [document for document in documents if document.label in known]
    if not kept:
        raise RKMError(f"{path} has no documents of the classes {shown}")
    return kept


def hold_out(given: dict[str, list[Document]], fraction: float, seed: int) -> dict[str, list[Document]]:
    """Draw validation documents at random from the training documents.

    Raises:
        RKMError: the training documents are too few to divide.
    """
    documents = given["train"]
    count = max(1, round(fraction * len(documents)))
    if count >= len(documents):
        raise RKMError(f"{len(documents)} training documents cannot be divided: give more, or --valid FILE")
    held = set(random.Random(seed).sample(range(len(documents)), count))
    parts = {
        "train": [document for i, document in enumerate(documents) if i not in held],
        "valid": [documents[i] for i in sorted(held)],
    }
    return parts | {split: rest for split, rest in given.items() if split != "train"}


def learn_pieces(preparation: Preparation, documents: list[Document], pieces: int, seed: int) -> None:
    """Train a SentencePiece model on the training text.

    Raises:
        RKMError: the text has fewer pieces than asked for, or more characters.
    """
    model = io.BytesIO()
    text = (preparation.normalize(document.text) for document in documents)
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=filter(None, text), model_writer=model, vocab_size=pieces, minloglevel=2
        )
    except (RuntimeError, OSError) as error:
        raise RKMError(f"--sentencepiece {pieces}: {str(error).splitlines()[-1]}") from None
    (preparation.folder / SENTENCEPIECE_MODEL).write_bytes(model.getvalue())


def tokenize(preparation: Preparation, documents: list[Document], workers: int) -> list[str]:
    """The documents' tokens, in order."""
    texts = [document.text for document in documents]
    if workers == 1:
        return list(map(preparation.tokens, texts))
    with multiprocessing.Pool(workers) as pool:
        return pool.map(preparation.tokens, texts, chunksize=500)


def write_text(
    folder: Path, splits: dict[str, list[Document]], tokens: dict[str, list[str]], classes: list[str]
) -> None:
    """Write ``text/SPLIT.input0``, ``text/SPLIT.label``, and a dictionary of labels that calls class k ``k``."""
    (folder / "text").mkdir()
    symbols = {label: str(k) for k, label in enumerate(classes, 1)}
    for split, documents in splits.items():
        order = list(range(len(documents)))
        if split != "test":
            order.sort(key=lambda i, lines=tokens[split]: len(lines[i].split()))  # type: ignore[misc]
        for name, lines in (
            ("input0", [tokens[split][i] for i in order]),
            ("label", [symbols[documents[i].label] for i in order]),
        ):
            (folder / "text" / f"{split}.{name}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    counts = collections.Counter(symbols[document.label] for document in splits["train"])
    dictionary = "".join(f"{symbol} {counts[symbol]}\n" for symbol in symbols.values())
    (folder / "text" / "dict.label").write_text(dictionary)


def binarize(folder: Path, splits: list[str], args: argparse.Namespace) -> None:
    """Run ``fairseq-preprocess`` on documents and labels; its output goes to ``preprocess.log`` in their folders."""
    logging.getLogger(preprocess.__name__).propagate = False
    # fairseq counts its special symbols among the words.
    most = args.max_words + Dictionary().nspecial if args.max_words > 0 else -1
    words = ["--thresholdsrc", args.min_count, "--nwordssrc", most, "--padding-factor", 1]
    labels = ["--srcdict", folder / "text" / "dict.label"]
    for name, flags in (("input0", words), ("label", labels)):
        prefixes = [item for split in splits for item in (f"--{split}pref", folder / "text" / f"{split}.{name}")]
        command = ["--only-source", *prefixes, "--destdir", folder / name, "--workers", args.workers, *flags]
        preprocess.main(options.get_preprocessing_parser().parse_args([str(item) for item in command]))


if __name__ == "__main__":
    main()
