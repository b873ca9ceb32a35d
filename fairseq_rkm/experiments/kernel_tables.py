"""Tabulate runs that differ in their kernel: documents, signals, language models and speed, a column a kernel.

    python scripts/kernel_tables.py --documents runs/kernels --signals runs/eeg --language-models runs/ptb \
        --speed speed.json

Each of the first three is a folder that holds a folder for each kernel, named after it: results of
examples/document_classification/table.py (kernels.sh makes them so) or examples/signals/table.py, or the train.log of a
language model, directly or a folder deeper. The last is the JSON file of ``scripts/benchmark.py recurrence --kernel``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments.classification_report import TITLES
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.experiments.signal_jobs import RESULT, SET_TITLES

Column = dict[str, str]
"""Figures of one kernel, by the rows' names."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="holds a folder of results for each kernel")
    parser.add_argument("--signals", type=Path, help="holds a folder of results for each kernel")
    parser.add_argument("--language-models", type=Path, help="holds a folder with a train.log for each kernel")
    parser.add_argument("--speed", type=Path, help="JSON of scripts/benchmark.py recurrence")
    args = parser.parse_args(arguments)
    if args.speed and not args.speed.is_file():
        parser.error(f"--speed: there is no file {args.speed}")
    tables = [
        tabulate(args.documents, "Test accuracy of documents, %", accuracies),
        tabulate(args.signals, "Accuracy of windows, %: mean over people", people),
        tabulate(args.language_models, "Perplexity", perplexities),
        speeds(json.loads(args.speed.read_text())) if args.speed else "",
    ]
    if not any(tables):
        parser.error("give --documents, --signals, --language-models or --speed")
    print("\n\n".join(filter(None, tables)))


def tabulate(folder: Path | None, title: str, figures: Callable[[Path], Column]) -> str:
    """A table of one kind of runs, with a column for each kernel that has figures.

    Raises:
        SystemExit: the folder holds none.
    """
    if folder is None:
        return ""
    kernels = [path for path in sorted(folder.glob("*/"), key=_place) if path.is_dir()]
    found = {path.name: taken for path in kernels if (taken := figures(path))}
    if not found:
        raise SystemExit(f"kernel_tables: no results in {folder}: it should hold a folder for each kernel")
    rows = dict.fromkeys(row for column in found.values() for row in column)
    return markdown(title, {row: {name: column.get(row, "") for name, column in found.items()} for row in rows})


def _place(path: Path) -> tuple[bool, str]:
    """The linear kernel comes first."""
    return path.name != "linear", path.name


def markdown(title: str, rows: dict[str, dict[str, str]]) -> str:
    """A table; the title stands above the rows' names."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in rows.items())]
    )


def results_in(folder: Path) -> list[dict[str, Any]]:
    """All results in and below a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob(RESULT))]


def accuracies(folder: Path) -> Column:
    """One kernel's classifiers of documents: mean, standard deviation and number of seeds."""
    runs: dict[str, list[float]] = {}
    for result in sorted(results_in(folder), key=_order):
        name = f"{TITLES.get(result['model'], result['model'])}, {result['ngram']}-gram"
        runs.setdefault(name, []).append(result["accuracy"])
    return {name: spread(values) for name, values in runs.items()}


def people(folder: Path) -> Column:
    """One kernel's classifiers of signals: mean and standard deviation over folds."""
    found = {}
    for result in sorted(results_in(folder), key=_order):
        name = f"{SET_TITLES[result['dataset']]}: {TITLES.get(result['model'], result['model'])}"
        matrices = [fold["confusion"] for fold in result["folds"]]
        right = [100 * sum(row[k] for k, row in enumerate(rows)) / sum(map(sum, rows)) for rows in matrices]
        found[f"{name}, {result['ngram']}-gram"] = spread(right)
    return found


def _order(result: dict[str, Any]) -> tuple:
    at = list(TITLES).index(result["model"]) if result["model"] in TITLES else len(TITLES)
    return result["dataset"], at, result["ngram"], result["seed"]


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation and number of several values."""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f} ({len(values)})"


def perplexities(folder: Path) -> Column:
    """One kernel's language model: the last validation, and the training's perplexity at some updates."""
    logs = sorted(folder.rglob("train.log"))
    if not logs:
        return {}
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    inner, valid = entries(lines, "train_inner"), entries(lines, "valid")
    found = {f"training, updates to {entry['num_updates']}": entry["ppl"] for entry in _some(inner)}
    return found | {f"validation, update {entry['valid_num_updates']}": entry["valid_ppl"] for entry in valid}


def _some(logged: list[dict[str, str]], count: int = 6) -> Iterable[dict[str, str]]:
    """So many entries at even distances, the last one among them."""
    step = max(1, -(-len(logged) // count))
    return logged[::-1][::step][::-1]


def speeds(measured: list[dict[str, Any]]) -> str:
    """Milliseconds of forward and backward pass, as PyTorch runs them and as a CUDA graph.

    Raises:
        SystemExit: the file holds something else.
    """
    rows: dict[str, Column] = {}
    for row in measured:
        if "kernel" not in row:
            continue
        shape = ", ".join(map(str, row["shape"]))
        way = "feedback" if row["feedback"] else "no feedback"
        for kind, words in (("forward_backward", "as PyTorch runs it"), ("graphed", "as a CUDA graph")):
            if kind in row:
                name = f"{row['cell']}, {way}, {row['dtype']}, {shape}: {words}"
                rows.setdefault(name, {})[row["kernel"]] = f"{row[kind]['median_ms']:.2f}"
    if not rows:
        raise SystemExit("kernel_tables: --speed has no rows of scripts/benchmark.py recurrence")
    return markdown("Milliseconds, forward and backward pass (T, B, m, d)", rows)
