"""One row of the table of signals: train its folds in groups, test them, and write the result."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

import fairseq_rkm
from fairseq_rkm.data.signals import SignalPreparation, joined, leave_one_group_out
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances, portable
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.signal_baselines import BASELINE_FUNCTIONS, PlainLSTM
from fairseq_rkm.experiments.signal_folds import HEAD, Fold, Training, Windows, fold_of, train_folds, windows_of
from fairseq_rkm.experiments.signal_jobs import BASELINES, RESULT, WITHOUT_CHANCE, WITHOUT_EPOCHS, Job
from fairseq_rkm.experiments.signal_sets import SETS, SignalSet, read_set


class Experiment(NamedTuple):
    """A data set in windows, and its folds.

    Attributes:
        windows: all windows.
        folds: a fold for each group that is left out, or for each seed of an archive's division.
        by_group: whether folds leave groups out.
        rate: samples a second, or None.
        channels: the channels' names.
    """

    windows: Windows
    folds: list[Fold]
    by_group: bool
    rate: float | None
    channels: list[str]


def set_of(args: argparse.Namespace, dataset: str) -> SignalSet:
    """A data set with the settings of ``--recipes``."""
    return SETS[dataset].changed(args.changes.get(dataset, {}))


def load(args: argparse.Namespace, dataset: str, model: str = "") -> Experiment:
    """Read a data set and divide it.

    To resample is a part of a cell's recipe: baselines without epochs see the rate of the files.

    Raises:
        RKMError: the data cannot be used.
    """
    chosen, seeds, groups = set_of(args, dataset), args.seeds, args.groups
    if model in BASELINE_FUNCTIONS:
        chosen = replace(chosen, resample=None)
    train, test = read_set(dataset, chosen, args.data)
    together = chosen.prepared(train if test is None else joined([train, test]))
    steps = round(chosen.window * (together.rate or 1)) if chosen.window else None
    windows = windows_of(together, steps, steps or 1)
    channels = together.channels or [str(number + 1) for number in range(together.width)]
    if test is None:
        divisions = list(leave_one_group_out(together))[:groups]
        folds = [fold_of(name, together, windows, *rows) for name, *rows in divisions]
        return Experiment(windows, folds, True, together.rate, channels)
    if set(test.known_labels()) - set(train.known_labels()):
        raise RKMError(f"{test.source} has classes that {train.source} lacks")
    rows = range(len(train)), range(len(train), len(together))
    one = fold_of("", together, windows, *rows)
    folds = [one._replace(name=str(seed)) for seed in seeds or chosen.seeds]
    return Experiment(windows, folds, False, together.rate, channels)


def run_job(args: argparse.Namespace, job: Job) -> None:
    """Train and test all folds, ``--folds-at-once`` at a time, and write ``result.json``.

    A finished group of folds is kept in a file of its own: the same command goes on with the next one.
    """
    fairseq_rkm.register()
    folder = args.out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    experiment = load(args, job.dataset, job.model)
    folds = experiment.folds[:1] if job.model in WITHOUT_CHANCE and not experiment.by_group else experiment.folds
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    size = 1 if job.model == "torch_lstm" else args.folds_at_once or (len(folds) if device.type == "cuda" else 1)
    if job.model in WITHOUT_EPOCHS:
        size = len(folds)
    parts = []
    for at in range(0, len(folds), size):
        path = folder / f"folds-{at}-{min(at + size, len(folds))}.json"
        if not path.is_file():
            write_json(path, run_folds(args, job, experiment, folds[at : at + size], device, folder), indent=None)
        parts.append(json.loads(path.read_text(encoding="utf-8")))
    write_json(folder / RESULT, result_of(args, job, experiment, parts), indent=None)


def run_folds(
    args: argparse.Namespace, job: Job, experiment: Experiment, folds: list[Fold], device: torch.device, folder: Path
) -> dict[str, Any]:
    """Train and test some folds; the first fold's filters go into ``filters.npz``."""
    windows, start = experiment.windows, time.monotonic()
    if job.model in BASELINE_FUNCTIONS:
        probabilities = BASELINE_FUNCTIONS[job.model](windows, folds, experiment.rate)
        weights, seconds, epochs = 0, time.monotonic() - start, 0
    else:
        training = training_of(args, job)
        build = builder(args, job, experiment)
        outcome = train_folds(build, windows, folds, training, job.seed, device, _tell(job.name, folds))
        probabilities, seconds, epochs = outcome.probabilities, outcome.seconds, training.epochs
        weights = _weights(build())
        if folds[0].name == experiment.folds[0].name and job.model not in BASELINES:
            save_filters(build(), outcome.models[0], experiment, folder)
    found = []
    for fold, one in zip(folds, probabilities, strict=True):
        labels = windows.labels[torch.from_numpy(fold.test)]
        recordings, correct = recording_votes(windows, fold, one)
        found.append({
            "name": fold.name, "confusion": confusion(labels, one.argmax(1), len(windows.classes)),
            "recordings": recordings, "recordings_right": correct, "train_windows": len(fold.train),
        })  # fmt: skip
    return {"folds": found, "weights": weights, "seconds": seconds, "epochs": epochs}


def _tell(name: str, folds: list[Fold]) -> Callable[[int, int, float], None]:
    start = time.monotonic()

    def tell(done: int, all_: int, loss: float) -> None:
        spent = time.monotonic() - start
        print(
            f"{name}, {len(folds)} folds from {folds[0].name}: {done}/{all_}, loss {loss:.3f}, {spent:.0f} s",
            flush=True,
        )

    return tell


def training_of(args: argparse.Namespace, job: Job) -> Training:
    """The recipe of a data set, changed by the command's flags."""
    chosen = set_of(args, job.dataset)
    return Training(
        args.epochs or chosen.epochs, args.lr or chosen.lr, args.batch_size or chosen.batch_size, chosen.weight_decay
    )


def builder(args: argparse.Namespace, job: Job, experiment: Experiment) -> Callable[[], nn.Module]:
    """A function that makes a model with its head, from the set's flags and the command's ``--model KEY=VALUE``."""
    from fairseq_rkm.models.signals import RKMSignalClassifier, RKMSignalClassifierConfig

    width, classes = experiment.windows.values.size(2), experiment.windows.classes
    if job.model == "torch_lstm":
        return lambda: PlainLSTM(width, len(classes))
    preparation = SignalPreparation(classes, None, [0.0] * width, [1.0] * width, experiment.rate)
    flags = {**set_of(args, job.dataset).flags, **args.model_flags, "cell": job.model, "ngram": job.ngram}
    cfg: Any = OmegaConf.merge(OmegaConf.structured(RKMSignalClassifierConfig), OmegaConf.create(flags))

    def build() -> nn.Module:
        model = RKMSignalClassifier.build_model(cfg, SimpleNamespace(preparation=preparation))
        model.register_classification_head(HEAD, len(classes))
        return model

    return build


def _weights(model: nn.Module) -> int:
    """The recurrent layers' weights, without biases."""
    rkm = getattr(model, "rkm", None)
    if rkm is not None:
        return int(rkm.num_weights())
    return sum(p.numel() for name, p in model.named_parameters() if "lstm.weight" in name)


def save_filters(model: Any, parameters: dict[str, torch.Tensor], experiment: Experiment, folder: Path) -> None:
    """Write the first layer's filters of a model with these parameters."""
    model.load_state_dict({**model.state_dict(), **parameters})
    write_filters(model, experiment.channels, experiment.rate, folder)


def write_filters(model: Any, channels: list[str], rate: float | None, folder: Path) -> None:
    """Write ``filters.npz`` for the picture: the first layer's filters, ``(gates, units, channels, n)``."""
    np.savez_compressed(
        folder / "filters.npz", filters=model.filters().float().numpy(), gates=np.array(model.rkm.gates),
        channels=np.array(channels), rate=np.array(rate or 0.0),
    )  # fmt: skip


def confusion(labels: torch.Tensor, predicted: torch.Tensor, classes: int) -> list[list[int]]:
    """Count the windows of class i (row) that were taken for class j (column)."""
    counts: list[list[int]] = (labels * classes + predicted).bincount(minlength=classes**2).view(classes, -1).tolist()
    return counts


def recording_votes(windows: Windows, fold: Fold, probabilities: torch.Tensor) -> tuple[int, int]:
    """The test recordings, and those whose mean probabilities tell the right class."""
    numbers, inverse = np.unique(windows.recordings[fold.test], return_inverse=True)
    total = torch.zeros(len(numbers), probabilities.size(1)).index_add_(0, torch.from_numpy(inverse), probabilities)
    labels = torch.zeros(len(numbers), dtype=torch.int64)
    labels[torch.from_numpy(inverse)] = windows.labels[torch.from_numpy(fold.test)]
    return len(numbers), int((total.argmax(1) == labels).sum())


def recipe_of(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The settings of a row that are no flags of the model."""
    chosen, training = set_of(args, job.dataset), asdict(training_of(args, job))
    return {**{name: getattr(chosen, name) for name in ("rate", "resample", "whiten", "window")}, **training}


def result_of(args: argparse.Namespace, job: Job, experiment: Experiment, parts: list[dict]) -> dict[str, Any]:
    """The row's result, as ``result.json`` holds it."""
    return {
        "dataset": job.dataset, "model": job.model, "ngram": job.ngram, "seed": job.seed,
        "classes": experiment.windows.classes, "by_group": experiment.by_group,
        "folds": [fold for part in parts for fold in part["folds"]],
        "weights": parts[0]["weights"], "epochs": parts[0]["epochs"],
        "seconds": sum(part["seconds"] for part in parts),
        "flags": {**set_of(args, job.dataset).flags, **args.model_flags},
        "recipe": recipe_of(args, job),
        "command": portable(["examples/signals/table.py", *args.given], DATA=args.data, OUT=args.out),
        "circumstances": circumstances(),
    }  # fmt: skip
