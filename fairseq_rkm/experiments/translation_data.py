"""Prepare raw parallel text for fairseq: tokenise it, cut it into subwords, binarise it.

    python examples/translation/prepare.py TEXT -s de -t en --out DATA

TEXT holds train.de, train.en and so on, a sentence a line, plain or as .gz or .xz. There is a training set, a
validation set (valid, val or dev) and one or more test sets (test...). --train, --valid and --test give other names.
DATA gets

    bin/                        binarised splits train, valid, test (test1, ... of further --test), and dict.*.txt
    sentencepiece.bpe.model     one for both languages, learnt on train
    text/                       the splits in subwords
    raw/                        valid and the test sets as they were
    data.json                   the languages, and the file of each split; written last

fairseq itself tokenises (--tokenizer moses, --bpe sentencepiece): fairseq-interactive with these flags takes raw text.
A second call with the same arguments and text returns at once.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig

from fairseq_rkm.data.text_file import decoded
from fairseq_rkm.errors import RKMError

OPENERS: dict[str, Callable] = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def find(folder: Path, name: str) -> Path:
    """The file of a split and language, compressed or not.

    Raises:
        SystemExit: there is none.
    """
    for suffix in OPENERS:
        if (path := folder / (name + suffix)).is_file():
            return path
    raise SystemExit(f"prepare: {folder} has no {name} (nor .gz or .xz): give --train, --valid and --test their names")


def read_lines(path: Path) -> list[str]:
    """A file's lines, with single spaces.

    Raises:
        SystemExit: the file is damaged or not UTF-8.
    """
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as lines:
            return [" ".join(line.split()) for line in decoded(lines, str(path))]
    except RKMError as error:
        raise SystemExit(f"prepare: {error}") from None
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise SystemExit(f"prepare: {path} is damaged: {error}") from error


def read_pairs(folder: Path, split: str, languages: tuple[str, str], keep_empty: bool) -> list[tuple[str, str]]:
    """The pairs of a split.

    Args:
        folder: holds a file for each split and language.
        split: the split's name in the folder.
        languages: source and target.
        keep_empty: refuse pairs with an empty side; otherwise leave them out.

    Raises:
        SystemExit: the files differ in length or are empty, or a side is empty and ``keep_empty`` refuses it.
    """
    paths = [find(folder, f"{split}.{language}") for language in languages]
    source, target = map(read_lines, paths)
    if len(source) != len(target) or not source:
        raise SystemExit(
            f"prepare: {paths[0]} has {len(source):,} lines and {paths[1]} {len(target):,}: parallel text has as many "
            "in both, and more than none"
        )
    empty = [number for number, pair in enumerate(zip(source, target, strict=True), 1) if not all(pair)]
    if empty and keep_empty:
        raise SystemExit(f"prepare: line {empty[0]} of {split} is empty in one language: take it out of both files")
    if empty:
        print(f"{split}: {len(empty):,} pairs with an empty side are left out, the first of them line {empty[0]}")
    return [pair for pair in zip(source, target, strict=True) if all(pair)]


def tokenise(pairs: list[tuple[str, str]], languages: tuple[str, str], name: str) -> list[tuple[str, str]]:
    """Tokenise the pairs with fairseq's moses tokeniser; ``name`` stands in the printed progress."""
    moses = [MosesTokenizer(MosesTokenizerConfig(source_lang=language)) for language in languages]
    done = []
    for number, pair in enumerate(pairs, 1):
        done.append((moses[0].encode(pair[0]), moses[1].encode(pair[1])))
        if number % 20_000 == 0 or number == len(pairs):
            print(f"{name}: {number:,} of {len(pairs):,} pairs tokenised", flush=True)
    return done


def learn_pieces(lines: Iterator[str], size: int, prefix: Path) -> sentencepiece.SentencePieceProcessor:
    """Learn a BPE model of both languages, and save it as ``prefix.model``.

    Raises:
        SystemExit: the text has fewer pieces than ``size``, or more characters.
    """
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_prefix=str(prefix), vocab_size=size, model_type="bpe",
            character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise SystemExit(f"prepare: {_other_size(size, str(error))}") from error
    Path(f"{prefix}.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def _other_size(size: int, complaint: str) -> str:
    """Explain sentencepiece's complaint about a vocabulary's size, and name a size that suits the text."""
    flag = "--vocabulary (for run.sh VOCABULARY)"
    if most := re.search(r"value <= (\d+)", complaint):
        return f"the training text is too small for a vocabulary of {size:,} subwords: give {flag} {most[1]} or fewer"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", complaint):
        return f"a vocabulary of {size:,} subwords does not hold the text's characters: give {flag} {least[1]} or more"
    return f"cannot make a vocabulary of {size:,} subwords ({flag}): {complaint}"


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a file, a sentence a line, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def name_splits(args: argparse.Namespace) -> dict[str, str]:
    """The files' names by split: train, valid, test, test1, ...

    Raises:
        SystemExit: there is no test set.
    """
    endings = tuple(f".{args.target_lang}{suffix}" for suffix in OPENERS)
    there = {path.name.removesuffix(end) for path in args.text.glob("*") for end in endings if path.name.endswith(end)}
    valid = args.valid or next((name for name in ("valid", "val", "dev") if name in there), "valid")
    tests = args.test or sorted(name for name in there if name.startswith("test"))
    if not tests:
        raise SystemExit(f"prepare: {args.text} has no test*.{args.target_lang} (nor .gz or .xz): name one by --test")
    return {"train": args.train, "valid": valid} | {f"test{n or ''}": name for n, name in enumerate(tests)}


def prepare(args: argparse.Namespace, files: dict[str, str]) -> None:
    """Write everything but data.json."""
    languages = (args.source_lang, args.target_lang)
    splits = {
        split: read_pairs(args.text, name, languages, keep_empty=split.startswith("test"))
        for split, name in files.items()
    }
    for split, pairs in splits.items():
        if split != "train":
            for side, language in enumerate(languages):
                write_lines(args.out / "raw" / f"{split}.{language}", [pair[side] for pair in pairs])
    tokenised = {split: tokenise(pairs, languages, split) for split, pairs in splits.items()}
    print(f"learning a vocabulary of {args.vocabulary:,} subwords")
    pieces = learn_pieces(
        (line for pair in tokenised["train"] for line in pair), args.vocabulary, args.out / "sentencepiece.bpe"
    )
    for split, pairs in tokenised.items():
        for side, language in enumerate(languages):
            encoded = (" ".join(pieces.encode(pair[side], out_type=str)) for pair in pairs)
            write_lines(args.out / "text" / f"{split}.{language}", list(encoded))
    binarise(args.out, languages, [split for split in splits if split.startswith("test")])


def binarise(out: Path, languages: tuple[str, str], tests: list[str]) -> None:
    """Run fairseq-preprocess with one dictionary for both languages.

    Raises:
        SystemExit: it failed; the message holds the end of its output.
    """
    print("fairseq-preprocess")
    text = out / "text"
    command = [
        sys.executable, "-m", "fairseq_cli.preprocess", "--source-lang", languages[0], "--target-lang", languages[1],
        "--trainpref", text / "train", "--validpref", text / "valid", "--testpref",
        ",".join(str(text / test) for test in tests), "--joined-dictionary", "--destdir", out / "bin",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"prepare: fairseq-preprocess failed:\n{done.stderr[-2000:]}")


def fingerprint(args: argparse.Namespace, files: dict[str, str]) -> str:
    """A digest of the vocabulary's size and the raw files; equal ones need no second preparation."""
    digest = hashlib.sha256(f"{args.vocabulary} {files}".encode())
    for name in files.values():
        for language in (args.source_lang, args.target_lang):
            digest.update(find(args.text, f"{name}.{language}").read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="folder of raw parallel text")
    parser.add_argument("-s", "--source-lang", required=True)
    parser.add_argument("-t", "--target-lang", required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DATA")
    parser.add_argument("--train", default="train", help="the training text's name in TEXT")
    parser.add_argument("--valid", help="the validation text's")
    parser.add_argument("--test", nargs="+", help="those of the test sets")
    parser.add_argument("--vocabulary", type=int, default=8000, help="subwords, both languages together")
    args = parser.parse_args()
    files = name_splits(args)
    about = {
        "languages": [args.source_lang, args.target_lang],
        "splits": files,
        "fingerprint": fingerprint(args, files),
    }
    record = args.out / "data.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == about:
        print(f"{args.out} is ready")
        return
    shutil.rmtree(args.out / "bin", ignore_errors=True)
    record.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(args, files)
    record.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out} is ready")


if __name__ == "__main__":
    main()
