"""Train and test a table of document classifiers: cells x n-grams x data sets x seeds, beside two baselines.

    python examples/document_classification/table.py --data ../shared/data --out runs/table2 --jobs 8 --minutes 9
    python scripts/report.py runs/table2 --out runs/table2/report

``--data`` holds a folder for each data set, with train.csv and test.csv (or .csv.xz, .csv.gz). A file classes.txt may
name the classes. A job trains one classifier (``fairseq-train``), counts its errors on the test set and writes
result.json. Give the same command again after an interruption: finished jobs are skipped, and a job that was cut off
goes on from its last epoch. Flags after ``--`` go to fairseq-train as they are.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fairseq_rkm.experiments import task_pool
from fairseq_rkm.experiments.classification_jobs import BASELINES, PAPER_CELLS, RESULT, SETTINGS, Job, settings_of
from fairseq_rkm.ops import CELLS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    visible = task_pool.hide_gpus()
    from fairseq_rkm.experiments import classification_run  # imports fairseq, which looks at GPUs

    task_pool.share_processors(args.jobs)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    unprepared = [name for name in args.datasets if not (args.out / "data" / name).exists()]
    prepared = [task_pool.Task(f"data/{name}", classification_run.prepare_dataset, (args, name)) for name in unprepared]
    failed = task_pool.run_all(prepared, args.out, args.jobs, [None], deadline, outcome)
    tasks = [task_pool.Task(job.name, classification_run.run_job, (args, job)) for job in plan(args)]
    waiting = task_pool.not_done(tasks, args.out, RESULT, "classifiers", args.jobs)
    ready = [task for task in waiting if (args.out / "data" / task.arguments[1].dataset).exists()]
    failed += task_pool.run_all(
        ready, args.out, args.jobs, [None] if args.cpu else task_pool.gpus(visible), deadline, outcome
    )
    task_pool.exit_if_failed(failed, args.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    own, extra = task_pool.split_command_line(sys.argv[1:] if arguments is None else arguments)
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
    """All jobs, the first seeds first. Baselines have no n-grams, and logistic regression needs one seed."""
    jobs = []
    for dataset, model, ngram in itertools.product(args.datasets, args.models, args.ngrams):
        if model in BASELINES and ngram != args.ngrams[0]:
            continue
        seeds = args.seeds or settings_of(dataset).seeds
        chosen = seeds[:1] if model == "logistic_regression" else seeds
        jobs += [Job(dataset, model, 1 if model in BASELINES else ngram, seed) for seed in chosen]
    return sorted(jobs, key=lambda job: job.seed)


def outcome(folder: Path) -> str:
    """The accuracy of a finished job, in words."""
    result = folder / RESULT
    return f"{json.loads(result.read_text())['accuracy']:.2f}%" if result.is_file() else "done"


if __name__ == "__main__":
    main()
