"""Train and test a table of signal classifiers: cells x n-grams x data sets x groups, beside baselines.

    python examples/signals/table.py --data ../shared/data --out runs/table4 --datasets eeg
    python scripts/report.py runs/table4 --out runs/table4/report

A job is one row: a cell with an n-gram, or a baseline, on all folds of a data set. Sets with people leave one person
out after the other; an archive's sets have their own test part, and a fold for each seed. On a GPU all folds of a row
are trained side by side as one batched model; on a CPU one after the other, by the fast kernels. Give the same command
again after an interruption: finished rows and groups of folds are skipped.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments import task_pool
from fairseq_rkm.experiments.classification_jobs import PAPER_CELLS
from fairseq_rkm.experiments.signal_jobs import (
    BASELINES,
    GROUPED,
    RESULT,
    SET_TITLES,
    WITHOUT_EPOCHS,
    Job,
)
from fairseq_rkm.ops import CELLS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    visible = task_pool.hide_gpus()
    from fairseq_rkm.experiments import signal_run  # imports fairseq, which looks at GPUs
    from fairseq_rkm.experiments.signal_report import outcome

    task_pool.share_processors(args.jobs)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    jobs = plan(args)
    try:
        args.model_flags, args.changes = model_flags(args.model), changes(args.recipes)
        for name in dict.fromkeys(job.dataset for job in jobs):
            signal_run.load(args, name)
    except RKMError as error:
        sys.exit(f"table: error: {error}")
    tasks = [task_pool.Task(job.name, signal_run.run_job, (args, job)) for job in jobs]
    devices = [None] if args.cpu else task_pool.gpus(visible)
    task_pool.run_table(tasks, RESULT, "rows", args.out, args.jobs, devices, deadline, outcome, progress)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of eeg_mental_arithmetic")
    add("--out", type=Path, required=True, help="folder of logs and results")
    add("--datasets", nargs="+", default=["eeg"], choices=list(SET_TITLES), help="default: eeg")
    add("--models", nargs="+", default=[*PAPER_CELLS, "band_power", "torch_lstm"], choices=[*CELLS, *BASELINES],
        help="cells and baselines (default: Table 4's cells, band_power and torch_lstm)")  # fmt: skip
    add("--ngrams", nargs="+", type=int, default=[40, 1], help="default: 40 1")
    add("--seeds", nargs="+", type=int, help="default: 1 where people are left out, else 1 to 5")
    add("--groups", type=int, help="leave out only so many groups, the first (default: all)")
    add("--folds-at-once", type=int, help="folds of one batched model (default: all on a GPU, 1 on a CPU)")
    add("--epochs", type=int, help="default: the set's own")
    add("--lr", type=float, help="default: the set's own")
    add("--batch-size", type=int, help="windows; default: the set's own")
    add("--recipes", type=Path, metavar="FILE", help="settings of the sets, as signal_choice writes them")
    add("--model", nargs="+", default=[], metavar="KEY=VALUE", help="the model's configuration: encoder_hidden_size=32")
    add("--jobs", type=int, default=1, help="rows at a time, over all GPUs (default: 1)")
    add("--minutes", type=float, help="stop after so many; the same command goes on")
    add("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args(given)
    for name in ("jobs", "groups", "folds_at_once", "epochs", "lr", "batch_size", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if min(args.ngrams) < 1:
        parser.error(f"--ngrams must be at least 1, not {min(args.ngrams)}")
    args.given = given
    return args


def model_flags(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; the keys are those of ``rkm_signal_classifier``'s configuration.

    Raises:
        RKMError: a pair is none, or the key is unknown.
    """
    import yaml

    from fairseq_rkm.models.signals import RKMSignalClassifierConfig

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in RKMSignalClassifierConfig.__dataclass_fields__ or key in {"cell", "ngram"}:
            raise RKMError(
                f"--model takes KEY=VALUE of rkm_signal_classifier (python -m fairseq_rkm --help), not {pair!r}; cells "
                "and n-grams are --models and --ngrams"
            )
        found[key] = yaml.safe_load(value)
    return found


def changes(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read the settings of sets from a file of JSON: ``{"eeg": {"epochs": 9, "flags": {"noise": 0.5}}}``.

    Raises:
        RKMError: it cannot be read, or it names an unknown set.
    """
    if path is None:
        return {}
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RKMError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(held, dict) or not all(
        name in SET_TITLES and isinstance(one, dict) for name, one in held.items()
    ):
        raise RKMError(f"{path} must hold settings by the name of a set, {', '.join(SET_TITLES)}")
    return held


def plan(args: argparse.Namespace) -> list[Job]:
    """All rows, the first seeds first. Baselines have no n-grams; those without epochs have no seeds."""
    jobs = []
    for dataset, model, ngram in itertools.product(args.datasets, args.models, args.ngrams):
        if model in BASELINES and ngram != args.ngrams[0]:
            continue
        seeds = (args.seeds or [1]) if dataset in GROUPED else [0]
        chosen = [0] if model in WITHOUT_EPOCHS else seeds
        jobs += [Job(dataset, model, 1 if model in BASELINES else ngram, seed) for seed in chosen]
    return sorted(jobs, key=lambda job: job.seed)


def progress(folder: Path) -> str:
    """The state of a running row, in words."""
    log = folder.with_name(folder.name + ".log")
    lines = (
        [line for line in log.read_text(errors="replace").splitlines() if ", loss " in line] if log.is_file() else []
    )
    return lines[-1].partition(", ")[2] if lines else ""


if __name__ == "__main__":
    main()
