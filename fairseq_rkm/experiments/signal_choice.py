"""Choose the recipes of the table of signals by cross-validation inside training parts.

    python -m fairseq_rkm.experiments.signal_choice --data ../shared/data --out runs/recipes --datasets eeg
    python examples/signals/table.py --data ../shared/data --recipes runs/recipes/recipes.json --out runs/table4

An archive's training part is divided in five, by class; its test part is not read. Of a set of people the first half
takes part, three or more people left out at a time: the table's figures over the other half owe nothing to the choice.
``recipes.json`` holds the best candidate of each set, and ``choice.json`` the accuracy of all.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fairseq_rkm
from fairseq_rkm.data.signals import Recordings
from fairseq_rkm.data.signals.splits import ordered
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.signal_candidates import CANDIDATES
from fairseq_rkm.experiments.signal_folds import Fold, Windows, fold_of, train_folds, windows_of
from fairseq_rkm.experiments.signal_jobs import SET_TITLES, Job
from fairseq_rkm.experiments.signal_run import Experiment, builder, set_of, training_of
from fairseq_rkm.experiments.signal_sets import SETS, read_set

PARTS = 5
"""The parts of an archive's training part."""
PEOPLE = 6
"""The parts of half of the people."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    fairseq_rkm.register()
    args.out.mkdir(parents=True, exist_ok=True)
    start, found = time.monotonic(), {}
    try:
        for name in args.datasets:
            found[name] = compared(args, name, start)
    except RKMError as error:
        sys.exit(f"signal_choice: error: {error}")
    chosen = {name: max(rows, key=lambda row: row["accuracy"])["recipe"] for name, rows in found.items() if rows}
    write_json(args.out / "choice.json", {"circumstances": circumstances(), "cell": args.cell, "candidates": found})
    write_json(args.out / "recipes.json", chosen)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="as the table's")
    add("--out", type=Path, required=True, help="folder of recipes.json and choice.json")
    add("--datasets", nargs="+", default=["eeg"], choices=list(SET_TITLES), help="default: eeg")
    add("--cell", default="rkm_lstm", help="the cell to choose with (default: rkm_lstm)")
    add("--ngram", type=int, default=40, help="samples that a step sees (default: 40)")
    add("--candidates", type=int, help="only so many of each set, the first (default: all)")
    add("--epochs", type=int, help="in place of each candidate's own, to try the command")
    add("--seconds", type=float, default=float("inf"), help="begin no further candidate after so many")
    add("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args(arguments)
    # What the table's functions read beside.
    args.model_flags, args.changes, args.lr, args.batch_size = {}, {}, None, None
    return args


def compared(args: argparse.Namespace, name: str, start: float) -> list[dict[str, Any]]:
    """The accuracy of each of a set's candidates, in per cent of the windows."""
    recordings, test = read_set(name, SETS[name], args.data)
    recordings = half_of_the_people(recordings) if test is None else recordings
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    rows = []
    for recipe in CANDIDATES.get(name, [{}])[: args.candidates]:
        if time.monotonic() - start > args.seconds:
            break
        args.changes = {name: recipe}
        held = set_of(args, name).prepared(recordings.with_signals(list(recordings.signals)))
        experiment = inner(held, set_of(args, name).window)
        job = Job(name, args.cell, args.ngram, 1)
        groups = [experiment.folds] if device.type == "cuda" else [[fold] for fold in experiment.folds]
        build, training = builder(args, job, experiment), training_of(args, job)
        right = total = 0
        for folds in groups:
            outcome = train_folds(build, experiment.windows, folds, training, 1, device)
            for fold, probabilities in zip(folds, outcome.probabilities, strict=True):
                labels = experiment.windows.labels[torch.from_numpy(fold.test)]
                right, total = right + int((probabilities.argmax(1) == labels).sum()), total + len(labels)
        rows.append({"recipe": recipe, "accuracy": 100 * right / total, "windows": total})
        spent = time.monotonic() - start
        print(f"{name}: {rows[-1]['accuracy']:.2f}% of {total:,}, {spent:.0f} s: {recipe}", flush=True)
    return rows


def half_of_the_people(recordings: Recordings) -> Recordings:
    """The recordings of the first half of the groups."""
    groups = recordings.groups or []
    first = ordered(set(groups))[: len(set(groups)) // 2]
    return recordings.subset([i for i, group in enumerate(groups) if group in first])


def inner(recordings: Recordings, window: float | None) -> Experiment:
    """A training part in windows, and its division in folds: by group where there are groups, else by class."""
    steps = round(window * (recordings.rate or 1)) if window else None
    windows: Windows = windows_of(recordings, steps, steps or 1)
    every, labels = np.arange(len(recordings)), np.array(recordings.known_labels())
    part = np.zeros(len(every), dtype=np.int64)
    if recordings.groups is None:
        draw = np.random.default_rng(0)
        for label in windows.classes:
            rows = draw.permutation(every[labels == label])
            part[rows] = np.arange(len(rows)) % PARTS
    else:
        names = ordered(set(recordings.groups))
        part = np.array([names.index(group) % min(PEOPLE, len(names)) for group in recordings.groups])
    folds: list[Fold] = [
        fold_of(f"part {k}", recordings, windows, every[part != k].tolist(), every[part == k].tolist())
        for k in range(int(part.max()) + 1)
    ]
    channels = recordings.channels or [str(number + 1) for number in range(recordings.width)]
    return Experiment(windows, folds, recordings.groups is not None, recordings.rate, channels)


if __name__ == "__main__":
    main()
