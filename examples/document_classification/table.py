"""Train and test a table of document classifiers: cells x n-grams x data sets x seeds, beside two baselines.

    python examples/document_classification/table.py --data ../shared/data --out runs/table2 --jobs 8 --minutes 9
    python scripts/report.py runs/table2 --out runs/table2/report

``--data`` holds a folder for each data set with train.csv and test.csv (or .csv.xz, .csv.gz), and classes.txt if there
are names. A job trains one classifier (``fairseq-train``), counts its errors on the test set and writes result.json.
Jobs whose result is there are skipped, and a job that was cut off goes on from its last epoch: give the same command
again. Flags after ``--`` go to fairseq-train as they are.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from parallel import Task, exit_if_failed, fairseq_command, gpus, hide_gpus, run_all, split_command_line

VISIBLE_GPUS = hide_gpus()

import baselines
import fairseq_cli.train  # noqa: F401  before tasks are forked, so that none has to import it
import prepare
import torch
from classification_report import RESULT, read_log
from fairseq.data import data_utils
from report import circumstances, portable

import fairseq_rkm
from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.data.preparation import Preparation
from fairseq_rkm.models import RKMClassifier

PAPER_CELLS = [cell for cell in CELLS if cell != "ran"]
BASELINES = ["logistic_regression", "torch_lstm"]


@dataclass(frozen=True)
class Settings:
    """What differs from data set to data set.

    The dropouts are not the paper's: its training sets were hundreds of thousands of documents, on which it could do
    without. The smaller the set, the more words are dropped. Of the words of DBpedia's test set one in 16 is in no
    training document: it is read in ``pieces`` of words, so many. And most of its training documents have lost what is
    not ASCII, but none of the test documents: there it is ``ascii``, too.
    """

    epochs: int = 5
    lr: float = 0.003
    dropout_words: float = 0.2
    seeds: tuple[int, ...] = (1,)
    batch_size: int = 64
    pieces: int | None = None
    ascii: bool = False
    classes: list[str] = field(default_factory=list)


SETTINGS = {
    "agnews": Settings(epochs=3, seeds=(1, 2, 3), classes=["World", "Sports", "Business", "Sci/Tech"]),
    "dbpedia": Settings(
        epochs=12,
        lr=0.002,
        dropout_words=0.3,
        pieces=4000,
        ascii=True,
        classes=[
            "Company", "Educational institution", "Artist", "Athlete", "Office holder", "Mean of transportation",
            "Building", "Natural place", "Village", "Animal", "Plant", "Album", "Film", "Written work",
        ],
    ),
    "yelp_full": Settings(
        epochs=12, dropout_words=0.5, batch_size=32, classes=["1 star", "2 stars", "3 stars", "4 stars", "5 stars"]
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row of one seed: a cell, or a baseline."""

    dataset: str
    model: str
    ngram: int
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.dataset}/{self.model}-{self.ngram}gram-seed{self.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    # Several jobs must not each take all processors.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    unprepared = [name for name in args.datasets if not (args.out / "data" / name).exists()]
    prepared = [Task(f"data/{name}", prepare_dataset, (args, name)) for name in unprepared]
    failed = run_all(prepared, args.out, args.jobs, [None], deadline, outcome)
    jobs = plan(args)
    waiting = [job for job in jobs if not (args.out / job.name / RESULT).is_file()]
    ready = [job for job in waiting if (args.out / "data" / job.dataset).exists()]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} classifiers are done; {args.jobs} at a time now", flush=True)
    tasks = [Task(job.name, run_job, (args, job)) for job in ready]
    failed += run_all(tasks, args.out, args.jobs, [None] if args.cpu else gpus(VISIBLE_GPUS), deadline, outcome)
    exit_if_failed(failed, args.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    own, extra = split_command_line(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of data sets")
    add("--out", type=Path, required=True, help="folder of prepared data, logs and results")
    add("--datasets", nargs="+", default=list(SETTINGS), help=f"default: {' '.join(SETTINGS)}")
    add("--models", nargs="+", default=PAPER_CELLS + BASELINES, choices=[*CELLS, *BASELINES],
        help="cells and baselines (default: Table 2's cells and both baselines)")  # fmt: skip
    add("--ngrams", nargs="+", type=int, default=[1, 3], help="default: 1 3")
    add("--seeds", nargs="+", type=int, help="default: 1 2 3 for agnews, 1 for the others")
    add("--epochs", type=int, help="default: 3 for agnews, 12 for dbpedia and yelp_full, 5 for others")
    add("--jobs", type=int, default=1, help="how many at a time, over all GPUs (default: 1)")
    add("--minutes", type=float, help="stop after so many; the same command goes on")
    add("--cpu", action="store_true", help="leave GPUs alone")
    add("--keep-checkpoints", action="store_true", help="do not delete a classifier once it is tested")
    args = parser.parse_args(own)
    for name in ("jobs", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    args.extra = extra
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """All jobs, the first seeds of all data sets first. Baselines know no n-grams, and only one of them chance."""
    jobs = []
    for dataset, model, ngram in itertools.product(args.datasets, args.models, args.ngrams):
        if model in BASELINES and ngram != args.ngrams[0]:
            continue
        seeds = args.seeds or SETTINGS.get(dataset, Settings()).seeds
        chosen = seeds[:1] if model == "logistic_regression" else seeds
        jobs += [Job(dataset, model, 1 if model in BASELINES else ngram, seed) for seed in chosen]
    return sorted(jobs, key=lambda job: job.seed)


def outcome(folder: Path) -> str:
    """What a finished job has reached."""
    result = folder / RESULT
    return f"{json.loads(result.read_text())['accuracy']:.2f}%" if result.is_file() else "done"


def prepare_dataset(args: argparse.Namespace, name: str) -> None:
    """A data set's binarized form in ``OUT/data/NAME``."""
    folder = args.data / name
    flags = ["--train", csv_file(folder, "train"), "--test", csv_file(folder, "test"), "--lowercase"]
    settings = SETTINGS.get(name, Settings())
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
    prepare.prepare(prepare.parse([*map(str, flags), "--out", str(args.out / "data" / name)]))


def csv_file(folder: Path, split: str) -> Path:
    """train.csv or test.csv, compressed or not.

    Raises:
        RKMError: neither.
    """
    for suffix in (".csv", ".csv.xz", ".csv.gz"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    raise RKMError(f"no {split}.csv (or .csv.xz, .csv.gz) in {folder}")


def run_job(args: argparse.Namespace, job: Job) -> None:
    """Train, test, and write ``result.json``."""
    folder, data = args.out / job.name, args.out / "data" / job.dataset
    folder.mkdir(parents=True, exist_ok=True)
    epochs = args.epochs or SETTINGS.get(job.dataset, Settings()).epochs
    if job.model == "logistic_regression":
        source = args.data / job.dataset
        found = baselines.logistic_regression(csv_file(source, "train"), csv_file(source, "test"))
    elif job.model == "torch_lstm":
        device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        found = baselines.plain_lstm(data, epochs, job.seed, device)
    else:
        found = train_cell(args, job, folder, data, epochs)
    about = {"dataset": job.dataset, "model": job.model, "ngram": job.ngram, "seed": job.seed}
    result = {
        **about, "classes": Preparation.load(data).classes, "accuracy": baselines.accuracy(found["confusion"]), **found,
        "circumstances": circumstances(),
    }  # fmt: skip
    partial = folder / f"{RESULT}.partial"
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.rename(folder / RESULT)


def train_cell(args: argparse.Namespace, job: Job, folder: Path, data: Path, epochs: int) -> dict[str, Any]:
    """``fairseq-train`` and the test set's confusion matrix.

    Tested is what training ends with, at a rate of zero: choosing among the last epochs by one or two thousand
    validation documents would add noise, and nothing else.
    """
    flags = train_flags(args, job, folder, data, epochs)
    log = folder / "train.log"
    fairseq_command("train", flags, log, append=True)
    classifier = RKMClassifier.from_pretrained(str(folder), "checkpoint_last.pt", str(data))
    if torch.cuda.is_available() and not args.cpu:
        classifier.cuda()
    result = {
        "confusion": classifier.confusion("test").tolist(),
        "weights": classifier.model.rkm.num_weights(),
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "command": portable(["fairseq-train", *flags], DATA=data, OUT=args.out),
        **read_log(log),
    }
    if not args.keep_checkpoints:
        for checkpoint in folder.glob("checkpoint*.pt"):
            checkpoint.unlink()
    return result


def train_flags(args: argparse.Namespace, job: Job, folder: Path, data: Path, epochs: int) -> list[str]:
    """The arguments of ``fairseq-train``."""
    classes = len(Preparation.load(data).classes)
    settings = SETTINGS.get(job.dataset, Settings())
    documents = len(data_utils.load_indexed_dataset(str(data / "label" / "train")))
    flags: list[Any] = [
        data, "--user-dir", Path(fairseq_rkm.__file__).parent, "--task", "sentence_prediction", "--criterion",
        "sentence_prediction", "--num-classes", classes, "--max-positions", 1_000_000, "--no-shuffle",
        "--arch", "rkm_classifier", "--cell", job.model, "--ngram", job.ngram, "--dropout-input", 0.5,
        "--dropout-words", settings.dropout_words, "--optimizer", "adamw_average", "--lr", settings.lr,
        "--clip-norm", 1, "--batch-size", settings.batch_size,
        "--lr-scheduler", "polynomial_decay", "--total-num-update", epochs * math.ceil(documents / settings.batch_size),
        "--required-batch-size-multiple", 1, "--max-epoch", epochs, "--seed", job.seed, "--distributed-world-size", 1,
        "--no-epoch-checkpoints", "--save-dir", folder, "--log-format", "json", "--log-interval", 100,
    ]  # fmt: skip
    return [*map(str, flags), *(["--cpu", "--num-workers", "0"] if args.cpu else []), *args.extra]


if __name__ == "__main__":
    main()
