"""Sweep a grid of sizes, batches and precisions: RKM against ``torch.nn.LSTM``, most telling fields first.

Results are written as they come. The same command goes on from its JSON file, also after it was stopped.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.flashrnn_layer import DTYPES, is_installed
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.sweep_measurement import (
    FLASHRNN,
    PRECISIONS,
    WRONG,
    Contender,
    Field,
    GPUError,
    measure_field,
)
from fairseq_rkm.experiments.sweep_tables import Row, heat_maps, line, markdown, regrets, summary
from fairseq_rkm.ops.cells import resolve_cell, resolve_clip
from fairseq_rkm.ops.dispatch import check_backend

SIZES = (1024, 512, 2048, 1536, 256, 64, 3072, 768, 1152, 128, 1150)
"""d, the most telling first; 1150 is beside 1152 as cuDNN pads it badly."""
BATCHES = (32, 128, 8, 512, 1)
"""B, the most telling first."""
SAME = ("hardware", "torch", "commit")
"""Circumstances that rows must share to be of one sweep."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand ``sweep``."""
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--sizes", type=count, nargs="+", default=SIZES, metavar="D", help="the most telling first")
    parser.add_argument("--batches", type=count, nargs="+", default=BATCHES, metavar="B", help="the most telling first")
    parser.add_argument(
        "--precisions", choices=list(PRECISIONS), nargs="+", metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}, the most telling first; by default all, and float32 on a CPU",
    )  # fmt: skip
    parser.add_argument("--length", type=count, default=64, metavar="T")
    parser.add_argument("--feedback", choices=["yes", "no"], nargs="+", default=["yes", "no"])
    parser.add_argument("--cell", choices=list(CELLS), default="rkm_lstm")
    parser.add_argument("--memory-clip", type=clip, default="auto", metavar="auto|none|NUMBER")
    parser.add_argument("--backends", nargs="+", default=["auto"], metavar="NAME", help="each is measured")
    parser.add_argument("--no-flashrnn", action="store_true", help="leave FlashRNN out where it is installed")
    parser.add_argument("--minutes", type=float, help="start no field after so many; by default all are measured")
    parser.add_argument("--seconds", type=float, default=0.1, help="how long to repeat each measurement")
    parser.add_argument("--threads", type=count, help="CPU threads")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure fields anew that the JSON file holds")
    parser.add_argument("--json", type=Path, help="where rows are kept as they come; a sweep goes on from its rows")
    parser.add_argument("--plot", type=Path, help="where to draw the ratios as heat maps")
    parser.set_defaults(run=sweep, keeps_rows=True)


def count(text: str) -> int:
    """Read a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def clip(text: str) -> str | float:
    """Read a bound of the memory, ``"auto"`` or ``"none"``."""
    try:
        resolve_clip(text, CELLS["rkm_lstm"], layer_norm=False)
    except RKMError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text if text in ("auto", "none") else float(text)


def sweep(args: argparse.Namespace) -> list[Row]:
    """The subcommand ``sweep``: measure all fields that are missing, keep each, and print and draw tables of all.

    Returns:
        All rows, earlier ones of the JSON file too (see :func:`~.sweep_measurement.measure_field`).

    Raises:
        SystemExit: a flag or the JSON file cannot be used; a result is wrong; or the GPU is in error.
    """
    contenders = contenders_of(args)
    about, kept = circumstances(), read(args.json)
    old = set() if args.again else {_key(row) for row in kept.values() if all(row[k] == about[k] for k in SAME)}
    todo = []
    for field in fields_of(args):
        missing = [c for c in contenders if _fits(c, field) and _key({**field._asdict(), **vars(c)}) not in old]
        if missing:
            todo.append((field, missing))
    print(f"{len(todo)} fields to measure", flush=True)
    broken = _measure(todo, args, kept, about)
    found = list(kept.values())
    report(found)
    if args.plot and found:
        heat_maps(found, args.plot)
    if broken:
        raise SystemExit("benchmark: the GPU takes no further work after the last field; start again to go on")
    wrong = sum(row.get("failure", "").startswith(WRONG) for row in found)
    if wrong:
        raise SystemExit(f"benchmark: {wrong} results are wrong, and have no time")
    return found


def _measure(
    todo: list[tuple[Field, list[Contender]]], args: argparse.Namespace, kept: dict[tuple[Any, ...], Row],
    about: dict[str, Any],
) -> bool:  # fmt: skip
    """Measure fields until the time is up, and put their rows into ``kept`` and into the JSON file.

    Returns:
        Whether the GPU is in error.
    """
    start, broken = time.perf_counter(), False
    for number, (field, contenders) in enumerate(todo, 1):
        minutes = (time.perf_counter() - start) / 60
        if args.minutes is not None and minutes >= args.minutes:
            print(f"time is up: {len(todo) - number + 1} fields are not measured; the same command goes on", flush=True)
            break
        torch.manual_seed(args.seed)
        try:
            rows = measure_field(field, contenders, args.device, args.seconds)
        except GPUError as error:
            rows, broken = error.args[0], True
        for row in rows:
            kept[_key(row)] = {**row, **about}
            print(f"[{number}/{len(todo)}, {minutes:.1f} min] {line(row)}", flush=True)
        if args.json:
            write_json(args.json, list(kept.values()))
        if broken:
            break
    return broken


def report(rows: list[Row]) -> None:
    """Print tables, sentences on the slowest fields and, if rows are of several machines or commits, a warning."""
    several = {tuple(row[k] for k in SAME) for row in rows}
    for text in (markdown(rows), summary(rows), "\n".join(regrets(rows))):
        if text:
            print(f"\n{text}")
    if len(several) > 1:
        print(f"\nThese rows are of {len(several)} machines, versions or commits: {sorted(several)}")


def contenders_of(args: argparse.Namespace) -> list[Contender]:
    """The layers to compare.

    Raises:
        SystemExit: flags contradict each other or name what is not there.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmark: no CUDA device here; use --device cpu")
    args.precisions = args.precisions or (list(PRECISIONS) if args.device == "cuda" else ["float32"])
    if args.device == "cpu" and "tf32" in args.precisions:
        raise SystemExit("benchmark: TF32 is a GPU's; leave tf32 out of --precisions")
    if args.device == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    found = []
    try:
        for feedback, backend in itertools.product(dict.fromkeys(args.feedback), dict.fromkeys(args.backends)):
            check_backend(backend)
            resolve_cell(args.cell, None if feedback == "no" else True)
            found.append(Contender(args.cell, feedback == "yes", args.memory_clip, backend))
    except RKMError as error:
        raise SystemExit(f"benchmark: {error}") from error
    if args.device == "cuda" and "yes" in args.feedback and not args.no_flashrnn and is_installed():
        found.append(Contender("lstm", feedback=True, memory_clip="none", backend=FLASHRNN))
    return found


def fields_of(args: argparse.Namespace) -> list[Field]:
    """The fields, the most telling first: those that stand early in all lists of flags."""
    lists = [list(dict.fromkeys(values)) for values in (args.sizes, args.batches, args.precisions)]
    places = sorted(itertools.product(*(range(len(values)) for values in lists)), key=lambda at: (sum(at), at))
    return [Field(args.length, *(values[i] for values, i in zip(lists, at, strict=True))) for at in places]


def _fits(contender: Contender, field: Field) -> bool:
    return contender.backend != FLASHRNN or field.precision in DTYPES


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*Field._fields, *Contender.__dataclass_fields__))


def read(path: Path | None) -> dict[tuple[Any, ...], Row]:
    """The rows of a JSON file by field and contender; none if there is no file.

    Raises:
        SystemExit: the file holds something else.
    """
    if path is None:
        return {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {}
    try:
        rows: Iterable[Row] = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            about, lstm = [row[k] for k in SAME], row["lstm"]
            if not all(isinstance(text, str) for text in about) or not isinstance(lstm, dict):
                raise TypeError(row)
        return {_key(row): row for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"benchmark: {path} holds no rows of a sweep ({error!r}); give --json another name") from error
