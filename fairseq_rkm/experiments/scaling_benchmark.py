"""Train a language model on one GPU and on several: tokens per second, and where an update's time goes.

The model and its recipe are those of ``ptb_fast`` (examples/language_model/config), with segments of one length and the
average of the weights from the first update on. The text is random.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fairseq_rkm.experiments.circumstances import PLUGIN, circumstances
from fairseq_rkm.experiments.command_pool import free_ports
from fairseq_rkm.experiments.corpus_benchmark import make_corpus
from fairseq_rkm.experiments.result_files import pyplot, write_json
from fairseq_rkm.experiments.timed_training import PARTS

Row = dict[str, Any]

RECIPE = [
    "--user-dir", str(PLUGIN), "--task", "stateful_language_modeling", "--arch", "rkm_lm_ptb_fast",
    "--cell", "rkm_lstm", "--criterion", "cross_entropy_ar_tar", "--optimizer", "adamw_average", "--average-last", "1",
    "--adam-betas", "(0.8, 0.99)", "--weight-decay", "0.1", "--lr", "1e-3", "--clip-norm", "0.25",
    "--ddp-backend", "legacy_ddp", "--num-workers", "0", "--no-save", "--disable-validation", "--log-interval", "1000",
    "--log-format", "simple", "--heartbeat-timeout", "120",
]  # fmt: skip
"""Flags of all runs. Flags of the command line come after them."""
WARM_UP = 0.25
"""The share of the updates, at their beginning, that is not measured: kernels are compiled and graphs recorded."""


def scaling(args: argparse.Namespace) -> list[Row]:
    """The subcommand ``scaling``: train on each number of GPUs, and print and draw how fast.

    Returns:
        A row a run: its numbers of GPUs and streams, tokens per second, their ratio to one GPU's, the milliseconds of
        an update and of its parts (:data:`~fairseq_rkm.experiments.timed_training.PARTS`).

    Raises:
        SystemExit: a run fails; the message shows the end of its output. Or the JSON file holds something else.
    """
    rows: list[Row] = []
    earlier = rows_of(args.json)
    runs = list(itertools.product(dict.fromkeys(args.batch), sizes_here(args), ways_here(args)))
    with tempfile.TemporaryDirectory() as folder:
        most = max((batch * gpus for batch, gpus, _ in runs), default=0)
        make_corpus(Path(folder), most * args.tokens_per_sample * args.updates, types=args.words)
        for number, (batch, gpus, graphs) in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}] {name(gpus, batch, graphs, args.device)}", flush=True)
            updates = train(Path(folder), args, batch, gpus, graphs)
            rows.append(row_of(updates, args, batch, gpus, graphs) | circumstances("ptb_fast"))
            add_ratios(rows)
            if args.json:
                write_json(args.json, [*earlier, *rows])
    print(f"\n{markdown(rows)}")
    if args.plot and rows:
        draw_scaling(rows, args.plot)
    return rows


def rows_of(path: Path | None) -> list[Row]:
    """The rows of a JSON file, to which more are to be added; none if there is no file. Its folder is made.

    Raises:
        SystemExit: the file holds something else.
    """
    if path is None:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"benchmark: {path} holds no rows ({error}); give --json another name") from error
    if not isinstance(rows, list):
        raise SystemExit(f"benchmark: {path} holds no list of rows; give --json another name")
    return rows


def sizes_here(args: argparse.Namespace) -> list[int]:
    """The asked numbers of GPUs that this machine has, the smallest first. Sentences tell which it has not."""
    here = torch.cuda.device_count() if args.device == "cuda" else max(args.gpus)
    for size in sorted(set(args.gpus)):
        if size > here:
            print(f"{size} GPUs are left out: here {'is' if here == 1 else 'are'} {here}", flush=True)
    return [size for size in sorted(set(args.gpus)) if size <= here]


def ways_here(args: argparse.Namespace) -> list[bool]:
    """Without CUDA graphs and with them."""
    if args.device == "cuda":
        return [False, True]
    print("CUDA graphs are left out: there is no GPU to replay them", flush=True)
    return [False]


def name(gpus: int, batch: int, graphs: bool, device: str) -> str:
    """A run in words."""
    unit = "GPU" if device == "cuda" else "CPU process"
    plural = "" if gpus == 1 else "s" if device == "cuda" else "es"
    return f"{gpus} {unit}{plural}, batch {batch} each, {'with' if graphs else 'without'} graphs"


def train(data: Path, args: argparse.Namespace, batch: int, gpus: int, graphs: bool) -> list[dict[str, float]]:
    """Train in a process for each GPU; the milliseconds of each part of each update of the first one.

    Raises:
        SystemExit: a process fails.
    """
    flags = [
        str(data), *RECIPE, "--batch-size", str(batch), "--tokens-per-sample", str(args.tokens_per_sample),
        "--max-update", str(args.updates), "--save-dir", str(data / "run"),
    ]  # fmt: skip
    flags += ["--bf16"] if args.precision == "bfloat16" else []
    flags += ["--cuda-graphs"] if graphs else []
    flags += ["--cpu", "--distributed-backend", "gloo"] if args.device == "cpu" else []
    flags += [*args.flags, "--distributed-world-size", str(gpus)]
    if gpus > 1:
        flags += ["--distributed-no-spawn", "--distributed-init-method", f"tcp://localhost:{next(free_ports())}"]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{rank}.txt") for rank in range(gpus)]
        ranks = []
        for rank, output in enumerate(outputs):
            place = ["--distributed-rank", str(rank), "--device-id", str(rank)] if gpus > 1 else []
            command = [sys.executable, "-m", f"{__package__}.timed_training", f"{output}.json", *flags, *place]
            with output.open("w") as file:
                ranks.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT))
        failed = wait_for_all(ranks)
        if failed is not None:
            raise SystemExit(f"benchmark: the process of rank {failed} failed:\n{outputs[failed].read_text()[-3000:]}")
        updates: list[dict[str, float]] = json.loads(Path(f"{outputs[0]}.json").read_text(encoding="utf-8"))
    return updates


def wait_for_all(ranks: list[subprocess.Popen]) -> int | None:
    """Wait until all processes end, or one fails: the others are then stopped.

    Returns:
        The number of the process that failed, or None.
    """
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [number for number, rank in enumerate(ranks) if rank.poll()]
            if failed:
                return failed[0]
            time.sleep(0.1)
        return next((number for number, rank in enumerate(ranks) if rank.returncode), None)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def row_of(updates: list[dict[str, float]], args: argparse.Namespace, batch: int, gpus: int, graphs: bool) -> Row:
    """What a run's measured updates tell.

    Raises:
        SystemExit: there are too few updates to measure.
    """
    measured = updates[round(WARM_UP * len(updates)) :]
    if len(measured) < 2:
        raise SystemExit(f"benchmark: {args.updates} updates are too few to measure: give more --updates")
    times = [sum(update.values()) for update in measured]
    tokens = gpus * batch * args.tokens_per_sample
    slow, _, fast = (1000 * tokens / ms for ms in reversed(statistics.quantiles(times, n=4)))
    return {
        "gpus": gpus, "batch": batch, "graphs": graphs, "device": args.device, "precision": args.precision,
        "tokens_per_sample": args.tokens_per_sample, "flags": args.flags, "updates": len(measured),
        "tokens_per_second": 1000 * tokens / statistics.mean(times), "quartiles": [slow, fast],
        "update_ms": statistics.mean(times),
        "parts_ms": {part: statistics.mean(update[part] for update in measured) for part in PARTS},
    }  # fmt: skip


def add_ratios(rows: list[Row]) -> None:
    """Give rows their ratio to the row of one GPU with the same batch, with graphs or without as they are."""
    alone = {(row["batch"], row["graphs"]): row["tokens_per_second"] for row in rows if row["gpus"] == 1}
    for row in rows:
        if (row["batch"], row["graphs"]) in alone:
            row["ratio"] = row["tokens_per_second"] / alone[row["batch"], row["graphs"]]


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    unit = "GPUs" if all(row["device"] == "cuda" for row in rows) else "processes"
    lines = [
        f"| batch | {unit} | graphs | tokens/s (quartiles) | times one | update (ms) | {' | '.join(PARTS)} |",
        f"| ---: | ---: | --- | ---: | ---: | ---: | {' | '.join('---:' for _ in PARTS)} |",
    ]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        parts = " | ".join(f"{row['parts_ms'][part]:.2f}" for part in PARTS)
        lines.append(
            f"| {row['batch']} | {row['gpus']} | {'yes' if row['graphs'] else 'no'} | {row['tokens_per_second']:,.0f} "
            f"({row['quartiles'][0]:,.0f}, {row['quartiles'][1]:,.0f}) | {ratio} | {row['update_ms']:.2f} | {parts} |"
        )
    return "\n".join(lines)


def draw_scaling(rows: list[Row], path: Path) -> None:
    """Draw tokens per second over the number of GPUs, and the parts of an update, into a PNG.

    Raises:
        RKMError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (speeds, parts) = plt.subplots(1, 2, figsize=(13, 1.8 + 0.4 * max(8, len(rows))), layout="constrained")
    for (batch, graphs), group in _lines(rows).items():
        label = f"batch {batch} each, {'with' if graphs else 'without'} graphs"
        sizes = [row["gpus"] for row in group]
        (drawn,) = speeds.plot(sizes, [row["tokens_per_second"] for row in group], marker="o", label=label)
        if "ratio" in group[0]:
            ideal = [group[0]["tokens_per_second"] * size / group[0]["gpus"] for size in sizes]
            speeds.plot(sizes, ideal, linestyle=":", color=drawn.get_color())
    speeds.set_xticks(sorted({row["gpus"] for row in rows}))
    speeds.set_ylim(bottom=0)
    speeds.set_xlabel("GPUs" if rows[0]["device"] == "cuda" else "processes")
    speeds.set_ylabel("tokens/s of all; dotted: as many times one")
    speeds.legend()
    left = [0.0] * len(rows)
    for part in PARTS:
        widths = [row["parts_ms"][part] for row in rows]
        parts.barh(range(len(rows)), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    parts.set_yticks(range(len(rows)), [name(r["gpus"], r["batch"], r["graphs"], r["device"]) for r in rows])
    parts.invert_yaxis()
    parts.set_xlabel("ms of an update")
    parts.legend()
    about = rows[0]
    figure.suptitle(
        f"{about['hardware']}, torch {about['torch']}, commit {about['commit']}, {about['precision']}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(rows: list[Row]) -> dict[tuple[int, bool], list[Row]]:
    found: dict[tuple[int, bool], list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["gpus"])):
        found.setdefault((row["batch"], row["graphs"]), []).append(row)
    return found
