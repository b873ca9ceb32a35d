"""The report of signal classifiers: tables with intervals over people, and pictures."""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments.classification_report import TITLES as CELL_TITLES
from fairseq_rkm.experiments.classification_report import plot_confusion
from fairseq_rkm.experiments.result_files import draw, write_json, write_results
from fairseq_rkm.experiments.signal_jobs import BASELINES, RESULT, SET_TITLES
from fairseq_rkm.experiments.signal_pictures import plot_filters, plot_people

PAPER = {
    "lstm": 80.24, "rkm_lstm": 79.02, "rkm_cifg": 77.58, "linear_kernel_gated": 76.11, "linear_kernel": 73.13,
    "gated_cnn": 76.02, "cnn": 73.40,
}  # fmt: skip
"""Accuracies in per cent of Table 4 (Liang et al. 2019): 40-grams, local field potentials of mice."""

TITLES = {
    **CELL_TITLES, "band_power": "log band power, ridge regression", "minirocket": "MiniRocket", "dtw": "1-NN DTW",
    "torch_lstm": "torch.nn.LSTM, plain",
}  # fmt: skip


@dataclass
class Row:
    """Runs of one data set, model and n-gram; they differ in their seed."""

    dataset: str
    model: str
    ngram: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The model's name, and its n-gram if it has one."""
        name = TITLES.get(self.model, self.model)
        return name if self.model in BASELINES else f"{name}, {self.ngram}-gram"

    @property
    def by_fold(self) -> dict[str, float]:
        """The accuracy of each fold's windows in per cent, the mean over runs."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for fold in run["folds"]:
                found.setdefault(fold["name"], []).append(100 * _right(fold["confusion"]))
        return {name: statistics.fmean(values) for name, values in found.items()}

    @property
    def mean(self) -> float:
        """The mean accuracy over folds, in per cent."""
        return statistics.fmean(self.by_fold.values())

    @property
    def confusion(self) -> list[list[int]]:
        """All folds' and runs' confusion matrices, summed."""
        matrices = [fold["confusion"] for run in self.runs for fold in run["folds"]]
        return [[sum(cells) for cells in zip(*lines, strict=True)] for lines in zip(*matrices, strict=True)]

    @property
    def balanced(self) -> float:
        """The mean over classes of the share of a class's windows that are right, in per cent."""
        return balanced_accuracy(self.confusion)

    @property
    def recordings(self) -> float:
        """The share of whole recordings that are right, by the mean of their windows' probabilities, in per cent."""
        folds = [fold for run in self.runs for fold in run["folds"]]
        return 100 * sum(fold["recordings_right"] for fold in folds) / sum(fold["recordings"] for fold in folds)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95%: over people, by Student's t; for an archive's test part, over its windows, by Wilson's score."""
        if self.runs[0]["by_group"]:
            return interval_over_people(list(self.by_fold.values()))
        return wilson(self.mean / 100, sum(map(sum, self.runs[0]["folds"][0]["confusion"])))


def balanced_accuracy(confusion: list[list[int]]) -> float:
    """The mean recall, in per cent, of the classes that occur.

    >>> balanced_accuracy([[9, 1], [2, 2]])
    70.0
    """
    recalls = [row[k] / sum(row) for k, row in enumerate(confusion) if sum(row)]
    return 100 * statistics.fmean(recalls)


def interval_over_people(accuracies: list[float]) -> tuple[float, float]:
    """The interval of 95% of the mean over people, by Student's t; the whole range from one person."""
    from scipy.stats import t

    if len(accuracies) < 2:
        return 0.0, 100.0
    mean, error = statistics.fmean(accuracies), statistics.stdev(accuracies) / math.sqrt(len(accuracies))
    reach = float(t.ppf(0.975, len(accuracies) - 1)) * error
    return max(0.0, mean - reach), min(100.0, mean + reach)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95% for a share of so many, in per cent."""
    z = 1.959964
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return 100 * (middle - reach) / (1 + z * z / count), 100 * (middle + reach) / (1 + z * z / count)


def _right(confusion: list[list[int]]) -> float:
    return sum(row[k] for k, row in enumerate(confusion)) / sum(map(sum, confusion))


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """Group results into rows in the order of the paper's table, the longest n-grams first."""
    rows: dict[tuple, Row] = {}
    order = [*PAPER, *TITLES]
    for run in runs:
        key = run["dataset"], run["model"], run["ngram"]
        rows.setdefault(key, Row(*key)).runs.append(run)
    datasets = list(dict.fromkeys(run["dataset"] for run in runs))

    def place(row: Row) -> tuple:
        at = order.index(row.model) if row.model in order else len(order)
        return datasets.index(row.dataset), row.model in BASELINES, -row.ngram, at

    return sorted(rows.values(), key=place)


def markdown(rows: list[Row]) -> str:
    """A table for each data set."""
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        title = SET_TITLES.get(dataset, dataset)
        parts += [f"### {title}\n", *_table([row for row in rows if row.dataset == dataset]), ""]
    return "\n".join(parts).rstrip() + "\n"


def _table(rows: list[Row]) -> list[str]:
    people = rows[0].runs[0]["by_group"]
    paper = rows[0].dataset == "eeg"
    over = f"over {len(rows[0].by_fold)} people" if people else "over test windows"
    columns = ["model", "weights", "accuracy, %", f"95% {over}", "balanced, %", "recordings, %"]
    columns += ["paper (mice), %"] * paper + ["training time"]
    lines = [_line(columns), _line(["---", *["---:"] * (len(columns) - 1)])]
    for row in rows:
        low, high = row.interval
        spread = list(row.by_fold.values())
        figure = f"{row.mean:.1f}" + (f" ± {statistics.stdev(spread):.1f}" if len(spread) > 1 else "")
        weights = f"{row.runs[0]['weights']:,}" if row.runs[0]["weights"] else ""
        cells = [row.label, weights, figure, f"{low:.1f} to {high:.1f}", f"{row.balanced:.1f}", f"{row.recordings:.1f}"]
        if paper:
            cells.append(f"{PAPER[row.model]:.2f}" if row.ngram == 40 and row.model in PAPER else "")
        lines.append(_line([*cells, f"{statistics.fmean(run['seconds'] for run in row.runs):.0f} s"]))
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def caption(rows: list[Row]) -> str:
    """Hardware, versions, commits and seeds, each named once."""
    runs = [run for row in rows for run in row.runs]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(run["circumstances"][name]) for run in runs}))

    seeds = sorted({run["seed"] for run in runs if run["seed"]})
    named = f"; seeds {', '.join(map(str, seeds))}" if seeds else ""
    return (
        f"{all_of('hardware')}; torch {all_of('torch')}; Python {all_of('python')}; commit {all_of('commit')}{named}. "
        "Accuracy of windows: the mean and standard deviation over people, or over seeds where the archive divides the "
        "data; of whole recordings by the mean probability. Training time is that of all folds."
    )


def outcome(folder: Path) -> str:
    """The accuracy of a finished row, in words."""
    path = folder / RESULT
    if not path.is_file():
        return "done"
    row = rows_of([json.loads(path.read_text(encoding="utf-8"))])[0]
    return f"{row.mean:.2f}%"


@dataclass
class _Matrix:
    """What :func:`plot_confusion` draws."""

    label: str
    mean: float
    runs: list[dict[str, Any]]


def plot(rows: list[Row], out: Path) -> None:
    """Draw ``confusion-SET.png``, ``people-SET.png`` and, for one cell, ``filters-SET.png``."""
    for dataset in dict.fromkeys(row.dataset for row in rows):
        chosen = [row for row in rows if row.dataset == dataset]
        classes = chosen[0].runs[0]["classes"]
        matrices = [_Matrix(r.label, r.mean, [{"classes": classes, "confusion": r.confusion}]) for r in chosen]
        plot_confusion(matrices, out / f"confusion-{dataset}.png")  # type: ignore[arg-type]
        if chosen[0].runs[0]["by_group"]:
            plot_people([(row.label, row.by_fold) for row in chosen], out / f"people-{dataset}.png")
        learned = [row for row in chosen if Path(row.runs[0].get("folder", ""), "filters.npz").is_file()]
        if learned:
            best = max(learned, key=lambda row: (row.ngram, row.model == "rkm_lstm"))
            plot_filters(Path(best.runs[0]["folder"], "filters.npz"), best.label, out / f"filters-{dataset}.png")


def write(runs: list[dict[str, Any]], out: Path) -> None:
    """Write ``results.md``, ``results.json`` and the pictures to the folder ``out``; print the tables."""
    rows = rows_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = write_results(out, f"{markdown(rows)}\n{caption(rows)}\n")
    kept = [{key: value for key, value in run.items() if key != "folder"} for row in rows for run in row.runs]
    write_json(out / "results.json", kept)
    pictures = ", confusion matrices, people and filters" if draw(plot, rows, out) else ""
    print(f"{text}\nTables, JSON{pictures}: {out}")
