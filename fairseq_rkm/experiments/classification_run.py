"""One document classifier of the table: prepare its data, train it, test it."""

import argparse
import math
from pathlib import Path
from typing import Any

import fairseq_cli.train  # noqa: F401  imported once, before tasks are forked
import torch
from fairseq.data import data_utils

from fairseq_rkm.data.preparation import Preparation
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments import classification_baselines, classification_data
from fairseq_rkm.experiments.circumstances import PLUGIN, portable
from fairseq_rkm.experiments.classification_jobs import Job, settings_of
from fairseq_rkm.experiments.classification_scores import scores, write_result
from fairseq_rkm.experiments.fairseq_command import fairseq_command


def prepare_dataset(args: argparse.Namespace, name: str) -> None:
    """Binarize a data set into ``OUT/data/NAME``, with its own settings."""
    folder = args.data / name
    flags = ["--train", csv_file(folder, "train"), "--test", csv_file(folder, "test"), "--lowercase"]
    settings = settings_of(name)
    if settings.pieces:
        flags += ["--sentencepiece", settings.pieces]
    if settings.ascii:
        flags.append("--ascii")
    names = folder / "classes.txt"
    if not names.is_file() and settings.classes:
        names = args.out / "data" / f"{name}.classes"
        names.write_text("".join(f"{line}\n" for line in settings.classes))
    if names.is_file():
        flags += ["--classes", names]
    classification_data.prepare(classification_data.parse([*map(str, flags), "--out", str(args.out / "data" / name)]))


def csv_file(folder: Path, split: str) -> Path:
    """The file of a split, ``SPLIT.csv``, compressed or not.

    Raises:
        RKMError: there is none.
    """
    for suffix in (".csv", ".csv.xz", ".csv.gz"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise RKMError(f"no {split}.csv (or .csv.xz, .csv.gz) in {folder}")


def run_job(args: argparse.Namespace, job: Job) -> None:
    """Train, test, and write ``result.json``."""
    folder, data = args.out / job.name, args.out / "data" / job.dataset
    folder.mkdir(parents=True, exist_ok=True)
    epochs = args.epochs or settings_of(job.dataset).epochs
    if job.model == "logistic_regression":
        source = args.data / job.dataset
        found = classification_baselines.logistic_regression(csv_file(source, "train"), csv_file(source, "test"))
    elif job.model == "torch_lstm":
        device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        found = classification_baselines.plain_lstm(data, epochs, job.seed, device)
    else:
        found = train_cell(args, job, folder, data, epochs)
    about = {"dataset": job.dataset, "model": job.model, "ngram": job.ngram, "seed": job.seed}
    write_result(folder, about, Preparation.load(data).classes, found)


def train_cell(args: argparse.Namespace, job: Job, folder: Path, data: Path, epochs: int) -> dict[str, Any]:
    """Run ``fairseq-train``, and test the last checkpoint.

    The learning rate ends at zero, and the last checkpoint is tested. One or two thousand validation documents are too
    few to choose among the last epochs: a choice would only add noise.
    """
    flags = train_flags(args, job, folder, data, epochs)
    fairseq_command("train", flags, folder / "train.log", append=True)
    _, found = scores(folder, "checkpoint_last.pt", data, args.cpu)
    if not args.keep_checkpoints:
        for checkpoint in folder.glob("checkpoint*.pt"):
            checkpoint.unlink()
    return {**found, "command": portable(["fairseq-train", *flags], DATA=data, OUT=args.out)}


def train_flags(args: argparse.Namespace, job: Job, folder: Path, data: Path, epochs: int) -> list[str]:
    """The arguments of ``fairseq-train``."""
    classes = len(Preparation.load(data).classes)
    settings = settings_of(job.dataset)
    documents = len(data_utils.load_indexed_dataset(str(data / "label" / "train")))
    flags: list[Any] = [
        data, "--user-dir", PLUGIN, "--task", "sentence_prediction", "--criterion",
        "sentence_prediction", "--num-classes", classes, "--max-positions", 1_000_000, "--no-shuffle",
        "--arch", "rkm_classifier", "--cell", job.model, "--ngram", job.ngram, "--dropout-input", 0.5,
        "--dropout-words", settings.dropout_words, "--optimizer", "adamw_average", "--lr", settings.lr,
        "--clip-norm", 1, "--batch-size", settings.batch_size,
        "--lr-scheduler", "polynomial_decay", "--total-num-update", epochs * math.ceil(documents / settings.batch_size),
        "--required-batch-size-multiple", 1, "--max-epoch", epochs, "--seed", job.seed, "--distributed-world-size", 1,
        "--no-epoch-checkpoints", "--save-dir", folder, "--log-format", "json", "--log-interval", 100,
    ]  # fmt: skip
    return [*map(str, flags), *(["--cpu", "--num-workers", "0"] if args.cpu else []), *args.extra]
