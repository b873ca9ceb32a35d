"""Train every cell in every architecture with its defaults, and tabulate the losses.

    python scripts/train_defaults.py --text train.txt --source train.de --target train.en --documents train.csv

Language models carry their state over segments of 25 words in 8 streams. Translation and classification take batches
of 8 sentences or documents of at most 20 words. All models know the 500 most frequent words and have one layer of 128
units. Adam trains them, with gradients clipped to a norm of 1. All else is the default of rkm_lm, rkm and
rkm_classifier. Files may be compressed (.gz, .xz). Documents are CSV rows of a class and text. The table, in Markdown,
shows the mean loss, in nats, of the first and the last tenth of the updates.
"""

import argparse
import csv
import gzip
import lzma
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm import CELLS, register

Loss = Callable[[nn.Module, int], Tensor]
"""The loss of a model at an update."""

WORDS, UNITS, LENGTH, STREAMS, SEGMENT, BATCH = 500, 128, 20, 8, 25, 8


def dictionary_of(lines: Iterable[list[str]]) -> Dictionary:
    """A dictionary of the text's most frequent words; all others are unknown."""
    made = Dictionary()
    for word, count in Counter(word for line in lines for word in line).most_common(WORDS):
        made.add_symbol(word, count)
    return made


def numbers(line: list[str], words: Dictionary) -> list[int]:
    """The numbers of a line's first words and of the end symbol."""
    return [words.index(word) for word in line[:LENGTH]] + [words.eos()]


def padded(rows: list[list[int]], words: Dictionary) -> Tensor:
    """Rows of unequal lengths as one int64 tensor ``(B, T)``."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, words.pad())


def language_model(lines: list[list[str]], units: int) -> tuple[Callable[..., nn.Module], Loss]:
    """A function that builds an ``rkm_lm`` from flags, and its loss."""
    from fairseq_rkm.models.language_model import RKMLanguageModel, RKMLanguageModelConfig

    words = dictionary_of(lines)
    stream = torch.tensor([word for line in lines for word in numbers(line, words)])
    columns = stream[: len(stream) // STREAMS * STREAMS].view(STREAMS, -1)
    count = (columns.size(1) - 1) // SEGMENT
    sizes: dict[str, Any] = {"decoder_embed_dim": units, "decoder_hidden_size": units, "decoder_layers": 1}
    task = SimpleNamespace(source_dictionary=words, target_dictionary=words)

    def build(**flags: Any) -> nn.Module:
        cfg = OmegaConf.structured(RKMLanguageModelConfig(criterion_name=None, **sizes, **flags))
        return RKMLanguageModel.build_model(cfg, task)

    def loss(model: nn.Module, update: int) -> Tensor:
        segment = update % count
        piece = columns[:, segment * SEGMENT : (segment + 1) * SEGMENT + 1]
        logits, _ = model(piece[:, :-1], segment=segment)
        return F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())

    return build, loss


def translation(source: list[list[str]], target: list[list[str]], units: int) -> tuple[Callable[..., nn.Module], Loss]:
    """A function that builds an ``rkm`` from flags, and its loss."""
    from fairseq_rkm.models.translation import RKMConfig, RKMModel

    from_words, to_words = dictionary_of(source), dictionary_of(target)
    pairs = [(numbers(a, from_words), numbers(b, to_words)) for a, b in zip(source, target, strict=True)]
    sides = ("encoder_embed_dim", "encoder_hidden_size", "decoder_embed_dim", "decoder_hidden_size")
    sizes: dict[str, Any] = dict.fromkeys(sides, units)
    task = SimpleNamespace(source_dictionary=from_words, target_dictionary=to_words)

    def build(**flags: Any) -> nn.Module:
        cfg = OmegaConf.structured(RKMConfig(criterion_name=None, **sizes, **flags))
        return RKMModel.build_model(cfg, task)

    def loss(model: nn.Module, update: int) -> Tensor:
        batch = [pairs[(update * BATCH + row) % len(pairs)] for row in range(BATCH)]
        wanted = padded([b for _, b in batch], to_words)
        before = padded([[to_words.eos(), *b[:-1]] for _, b in batch], to_words)
        logits, _ = model(padded([a for a, _ in batch], from_words), None, before)
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=to_words.pad())

    return build, loss


def classification(texts: list[list[str]], classes: list[str], units: int) -> tuple[Callable[..., nn.Module], Loss]:
    """A function that builds an ``rkm_classifier`` from flags, and its loss."""
    from fairseq_rkm.models.classification import RKMClassifier, RKMClassifierConfig

    words, names = dictionary_of(texts), sorted(set(classes))
    rows, labels = [numbers(text, words) for text in texts], torch.tensor([names.index(name) for name in classes])
    sizes = {"encoder_embed_dim": units, "encoder_hidden_size": units, "classifier_hidden_size": units}

    def build(**flags: Any) -> nn.Module:
        settings = {"num_classes": len(names), "max_positions": 512, **sizes, **flags}
        known = RKMClassifierConfig.__dataclass_fields__
        cfg = OmegaConf.structured(RKMClassifierConfig(**{k: v for k, v in settings.items() if k in known}))
        model = RKMClassifier.build_model(cfg, SimpleNamespace(source_dictionary=words))
        model.register_classification_head("head", len(names))
        return model

    def loss(model: nn.Module, update: int) -> Tensor:
        at = torch.arange(update * BATCH, (update + 1) * BATCH) % len(rows)
        logits, _ = model(padded([rows[i] for i in at.tolist()], words), classification_head_name="head")
        return F.cross_entropy(logits, labels[at])

    return build, loss


def train(model: nn.Module, loss: Loss, rate: float, updates: int) -> Iterator[float]:
    """Train with Adam and yield each update's loss; stop at the first that is not finite."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for update in range(updates):
        value = loss(model, update)
        optimizer.zero_grad()
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        yield value.item() if norm.isfinite() else float("nan")
        if not (value.isfinite() and norm.isfinite()):
            return
        optimizer.step()


def outcome(losses: list[float], updates: int) -> str:
    """The text of one cell of the table."""
    if len(losses) < updates or losses[-1] != losses[-1]:
        return f"not finite at {len(losses)}"
    tenth = max(1, updates // 10)
    return f"{statistics.fmean(losses[:tenth]):.2f} to {statistics.fmean(losses[-tenth:]):.2f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("text", "a language model's"), ("source", ""), ("target", ""), ("documents", "CSV")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--lines", type=int, default=15_000, help="lines of each file that are read")
    parser.add_argument("--no-feedback", action="store_true")
    parser.add_argument("--memory-clip", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    register()

    def read(path: Path) -> list[list[str]]:
        with open_text(path) as lines:
            return [line.lower().split() for line in islice(lines, args.lines)]

    with open_text(args.documents) as lines:
        rows = [(row[0], " ".join(row[1:]).lower().split()) for row in islice(csv.reader(lines), args.lines)]
    archs = {
        "rkm_lm": language_model(read(args.text), UNITS),
        "rkm": translation(read(args.source), read(args.target), UNITS),
        "rkm_classifier": classification([text for _, text in rows], [name for name, _ in rows], UNITS),
    }
    columns = [(arch, rate) for arch in archs for rate in args.rates]
    print("| cell | " + " | ".join(f"`{arch}` {rate:g}" for arch, rate in columns) + " |")
    print("| --- |" + " --- |" * len(columns), flush=True)
    started = time.monotonic()
    for cell in args.cells:
        print(f"| `{cell}` |", end="", flush=True)
        for arch, rate in columns:
            torch.manual_seed(args.seed)
            build, loss = archs[arch]
            model = build(cell=cell, no_feedback=args.no_feedback, memory_clip=args.memory_clip)
            print(f" {outcome(list(train(model, loss, rate, args.updates)), args.updates)} |", end="", flush=True)
        print(flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


def open_text(path: Path) -> IO[str]:
    """Open a file of text, compressed or not."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8")  # type: ignore[operator]


if __name__ == "__main__":
    main()
