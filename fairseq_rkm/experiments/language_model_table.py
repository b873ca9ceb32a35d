r"""Train a table of language models, cells x corpora x seeds, over all GPUs; train.sh trains each.

    python examples/language_model/table.py ptb_fast=runs/ptb wikitext2_fast=runs/wt2 --out runs/table3 \
        -- common.bf16=true task.cuda_graphs=true
    python scripts/report.py runs/table3/*-*-*/run.json --out runs/table3/report

CONFIG is a file of config/ without its ending, and DATA a folder written by prepare.sh. Changes after ``--`` go to the
configuration of all runs, as with train.sh. Give the same command again after an interruption, by ``--minutes`` or
otherwise: a run with a run.json is done, and a run that was cut off goes on from its last checkpoint.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairseq_rkm.experiments import task_pool
from fairseq_rkm.experiments.circumstances import ROOT
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.ops import CELLS

TABLE_3 = ("rkm_lstm", "lstm", "rkm_cifg", "linear_kernel_gated")
"""The paper's cells."""


class Row(NamedTuple):
    """One run of the table."""

    config: str
    data: Path
    cell: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.config}-{self.cell}-{self.seed}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    own, changes = task_pool.split_command_line(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", metavar="CONFIG=DATA")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--cells", nargs="+", default=TABLE_3, choices=list(CELLS), help=f"default: {' '.join(TABLE_3)}"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, over all GPUs (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; the next call goes on")
    args = parser.parse_args(own)
    args.changes = changes
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    args.corpora = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in args.corpora)
    for config, data in args.corpora.items():
        if not (ROOT / f"examples/language_model/config/{config}.yaml").is_file():
            parser.error(f"no configuration {config} in examples/language_model/config")
        if not data or not Path(data, "test.bin").is_file():
            parser.error(f"no data for {config} in {data or 'a folder'}: give CONFIG=DATA, DATA from prepare.sh")
    return args


def plan(args: argparse.Namespace) -> list[Row]:
    """All runs, the first seeds first."""
    return [
        Row(config, Path(data).resolve(), cell, seed)
        for seed in args.seeds
        for config, data in args.corpora.items()
        for cell in args.cells
    ]


def train(row: Row, out: Path, changes: list[str]) -> None:
    """Run train.sh; it and this process end together."""
    command = ["bash", "examples/language_model/train.sh", row.config, str(row.data), str(out / row.name)]
    command += [f"model.cell={row.cell}", f"common.seed={row.seed}", *changes]
    # A group of its own holds all processes that train.sh starts, and ends as a whole.
    os.setsid()

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def outcome(folder: Path) -> str:
    """The perplexity of a finished run, in words."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return f"valid {run['valid_perplexity']}, test {run['test_perplexity']}"


def progress(folder: Path) -> str:
    """The state of a run in training, in words."""
    log = folder / "train.log"
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-300:]
    said = [f"update {entry['num_updates']}" for entry in entries(lines, "train_inner")][-1:]
    return ", ".join(said + [f"valid {entry['valid_ppl']}" for entry in entries(lines, "valid")][-1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    visible, out = task_pool.hide_gpus(), args.out.resolve()
    tasks = [task_pool.Task(row.name, train, (row, out, args.changes)) for row in plan(args)]
    deadline, devices = time.monotonic() + 60 * args.minutes, task_pool.gpus(visible)
    task_pool.run_table(tasks, "run.json", "runs", out, args.jobs, devices, deadline, outcome, progress)


if __name__ == "__main__":
    main()
