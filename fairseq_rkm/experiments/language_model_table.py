r"""Train a table of language models, cells x parts x corpora x seeds, over all GPUs; train.sh trains each.

    python examples/language_model/table.py ptb_fast=runs/ptb wikitext2_fast=runs/wt2 --out runs/table3 \
        -- common.bf16=true task.cuda_graphs=true
    python scripts/report.py runs/table3/*-*-*/run.json --out runs/table3/report

To find what pays, in short runs:

    python examples/language_model/table.py ptb_fast=runs/ptb --out runs/parts --cells rkm_lstm --length 0.33 \
        --parts none shuffle overlap past_decode past_decode=0.01 skip shuffle+past_decode model.dropout=0.5 \
        -- common.bf16=true task.cuda_graphs=true

A row of --parts is a sum of parts: past_decode, shuffle, overlap, skip and state_dropout, with a value or with one to
begin with, and keys of the configuration with a value. With several of them a list by validation perplexity comes last.

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

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments import language_model_parts, task_pool
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
    parts: str = language_model_parts.NONE
    length: float = 1.0

    @property
    def kind(self) -> str:
        """What runs that differ in their seed alone have in common."""
        parts, length = language_model_parts.name_of(self.parts), "" if self.length == 1 else f"{self.length:g}"
        return "-".join(part for part in (self.config, self.cell, parts, length) if part)

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    @property
    def changes(self) -> list[str]:
        """What it changes in its configuration."""
        return [
            f"model.cell={self.cell}", f"common.seed={self.seed}",
            *language_model_parts.shortened(configuration(self.config), self.length),
            *language_model_parts.changes_of(self.parts),
        ]  # fmt: skip


def configuration(name: str) -> Path:
    """The file of a configuration."""
    return ROOT / f"examples/language_model/config/{name}.yaml"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    own, changes = task_pool.split_command_line(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", metavar="CONFIG=DATA")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--cells", nargs="+", default=TABLE_3, choices=list(CELLS), help=f"default: {' '.join(TABLE_3)}"
    )
    parser.add_argument("--parts", nargs="+", default=[language_model_parts.NONE], help="default: none")
    parser.add_argument("--length", type=float, default=1.0, help="share of the recipe's updates to train for")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, over all GPUs (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; the next call goes on")
    args = parser.parse_args(own)
    args.changes = changes
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    if not 0 < args.length < float("inf"):
        parser.error(f"--length must be above 0, not {args.length}")
    try:
        for parts in args.parts:
            language_model_parts.changes_of(parts)
    except RKMError as error:
        parser.error(str(error))
    args.corpora = dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in args.corpora)
    for config, data in args.corpora.items():
        if not configuration(config).is_file():
            parser.error(f"no configuration {config} in examples/language_model/config")
        if not data or not Path(data, "test.bin").is_file():
            parser.error(f"no data for {config} in {data or 'a folder'}: give CONFIG=DATA, DATA from prepare.sh")
    return args


def plan(args: argparse.Namespace) -> list[Row]:
    """All runs, the first seeds first."""
    return [
        Row(config, Path(data).resolve(), cell, seed, parts, args.length)
        for seed in args.seeds
        for config, data in args.corpora.items()
        for cell in args.cells
        for parts in args.parts
    ]


def train(row: Row, out: Path, changes: list[str]) -> None:
    """Run train.sh; it and this process end together."""
    command = ["bash", "examples/language_model/train.sh", row.config, str(row.data), str(out / row.name)]
    command += [*row.changes, *changes]
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


def figures(path: Path) -> dict[str, Any]:
    """A run.json."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def outcome(folder: Path) -> str:
    """The perplexity of a finished run, in words."""
    run = figures(folder / "run.json")
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
    rows = plan(args)
    tasks = [task_pool.Task(row.name, train, (row, out, args.changes)) for row in rows]
    deadline, devices = time.monotonic() + 60 * args.minutes, task_pool.gpus(visible)
    task_pool.run_table(tasks, "run.json", "runs", out, args.jobs, devices, deadline, outcome, progress)
    done = [(row.kind, out / row.name / "run.json") for row in rows]
    results = [(kind, float(figures(path)["valid_perplexity"])) for kind, path in done if path.is_file()]
    if len(args.parts) > 1 and results:
        print(f"by validation perplexity, on which alone to choose:\n{language_model_parts.ranking(results)}")


if __name__ == "__main__":
    main()
