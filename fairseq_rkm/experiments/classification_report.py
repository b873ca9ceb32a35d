"""The report of document classifiers: tables beside the paper's, confusion matrices and learning curves."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments.fairseq_log import parse_line, time_of
from fairseq_rkm.experiments.result_files import draw, pyplot, write_json, write_results
from fairseq_rkm.ops import CELLS

PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "agnews": {
        "lstm": (91.82, 92.46), "rkm_lstm": (91.76, 92.28), "rkm_cifg": (92.29, 92.39),
        "linear_kernel_gated": (92.07, 91.49), "linear_kernel": (91.62, 91.50), "gated_cnn": (91.54, 91.78),
        "cnn": (91.20, 91.53),
    },
    "dbpedia": {
        "lstm": (98.98, 98.97), "rkm_lstm": (98.97, 99.00), "rkm_cifg": (98.99, 99.05),
        "linear_kernel_gated": (98.96, 98.94), "linear_kernel": (98.65, 98.77), "gated_cnn": (98.37, 98.77),
        "cnn": (98.17, 98.52),
    },
    "yelp_full": {
        "lstm": (66.27, 66.37), "rkm_lstm": (65.92, 66.43), "rkm_cifg": (65.93, 65.92),
        "linear_kernel_gated": (65.35, 65.94), "linear_kernel": (61.18, 62.11), "gated_cnn": (60.25, 64.30),
        "cnn": (59.77, 62.08),
    },
}  # fmt: skip
"""Accuracies in per cent of Table 2 (Liang et al. 2019), 1-gram and 3-gram, on the full training sets."""

TITLES = {
    "agnews": "AG News", "dbpedia": "DBpedia", "yelp_full": "Yelp Full",
    **{name: cell.title for name, cell in CELLS.items()},
    "torch_lstm": "torch.nn.LSTM, plain", "logistic_regression": "TF-IDF, logistic regression",
}  # fmt: skip


@dataclass
class Row:
    """Runs of one data set, model and n-gram; they differ in their seed."""

    dataset: str
    model: str
    ngram: int
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each seed, in per cent."""
        return [run["accuracy"] for run in self.runs]

    @property
    def mean(self) -> float:
        """The mean accuracy over the seeds, in per cent."""
        return statistics.fmean(self.accuracies)

    @property
    def paper(self) -> float | None:
        """The paper's accuracy, or None."""
        column = {1: 0, 3: 1}.get(self.ngram)
        cells = PAPER.get(self.dataset, {})
        return cells[self.model][column] if self.model in cells and column is not None else None

    @property
    def label(self) -> str:
        """The model's name, and its n-gram if it has one."""
        known = TITLES.get(self.model, self.model)
        return known if self.model in {"torch_lstm", "logistic_regression"} else f"{known}, {self.ngram}-gram"


def read_log(path: Path) -> dict[str, Any]:
    """Read validations and times from fairseq-train's log (``--log-format json``), resumed runs included.

    Returns:
        ``curve``: pairs of an epoch and the validation accuracy after it. ``training_curve``: the same for the accuracy
        in training. ``seconds_per_epoch``: the mean of whole epochs, without validation; None if there are none.
    """
    curve, training, durations, started = {}, {}, [], None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        time = time_of(line)
        if "| Start iterating over samples" in line and time:
            started = time
        elif '| begin validation on "' in line and time and started:
            durations.append((time - started).total_seconds())
            started = None
        kind, entry = parse_line(line)
        if kind == "valid":
            curve[int(entry["epoch"])] = float(entry["valid_accuracy"])
        elif kind == "train":
            training[int(entry["epoch"])] = float(entry["train_accuracy"])
    return {
        "curve": sorted(curve.items()),
        "training_curve": sorted(training.items()),
        "seconds_per_epoch": statistics.fmean(durations) if durations else None,
    }


def rows_of(runs: list[dict[str, Any]]) -> list[Row]:
    """Group results, a ``result.json`` each, into rows in the order of the paper's table."""
    rows: dict[tuple, Row] = {}
    order = list(TITLES)
    for run in runs:
        key = run["dataset"], run["model"], run["ngram"]
        rows.setdefault(key, Row(*key)).runs.append(run)

    def place(row: Row) -> tuple:
        return *(order.index(n) if n in order else len(order) for n in (row.dataset, row.model)), row.dataset, row.ngram

    return sorted(rows.values(), key=place)


def markdown(rows: list[Row]) -> str:
    """A table for each data set, and a comparison of its cells' order with the paper's."""
    parts = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        of_dataset = [row for row in rows if row.dataset == dataset]
        parts += [f"### {TITLES.get(dataset, dataset)}\n", *_table(of_dataset), "", *_orders(of_dataset)]
    return "\n".join(parts).rstrip() + "\n"


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | weights | accuracy, % | seeds | paper, % | training time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figure = f"{row.mean:.2f}"
        if len(row.runs) > 1:
            figure += f" ± {statistics.stdev(row.accuracies):.2f}"
        paper = "" if row.paper is None else f"{row.paper:.2f}"
        weights = f"{row.runs[0]['weights']:,}"
        lines.append(f"| {row.label} | {weights} | {figure} | {len(row.runs)} | {paper} | {_time(row.runs)} |")
    return lines


def _time(runs: list[dict[str, Any]]) -> str:
    """The epochs and the mean seconds of an epoch; the seconds in all for a model without epochs."""
    seconds = [run["seconds_per_epoch"] or 0 for run in runs]
    epochs = max(len(run["curve"]) for run in runs)
    return f"{epochs} x {statistics.fmean(seconds):.1f} s" if epochs else f"{statistics.fmean(seconds):.1f} s"


def _orders(rows: list[Row]) -> list[str]:
    """Compare the order of the cells with the paper's, a sentence for each n-gram with at least three cells."""
    from scipy.stats import spearmanr

    sentences = []
    for ngram in sorted({row.ngram for row in rows}):
        cells = [row for row in rows if row.ngram == ngram and row.paper is not None]
        if len(cells) > 2:
            agreement = spearmanr([row.mean for row in cells], [row.paper for row in cells]).statistic
            best = ", ".join(row.model for row in sorted(cells, key=lambda row: -row.mean))
            order = f"{ngram}-gram, best first: {best}."
            sentences.append(f"{order} Spearman's rank correlation with the paper's order: {agreement:.2f}.\n")
    return sentences


def caption(rows: list[Row]) -> str:
    """Hardware, versions, commits and seeds, each named once."""
    runs = [run for row in rows for run in row.runs]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(run["circumstances"][name]) for run in runs}))

    seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
    return (
        f"{all_of('hardware')}; torch {all_of('torch')}; Python {all_of('python')}; commit {all_of('commit')}; seeds "
        f"{seeds}. Accuracy: mean and standard deviation over the seeds, after the last epoch (the plain LSTM: of the "
        "epoch that was best in validation). The paper's figures are for the full training sets, of 120,000 to 650,000 "
        "documents."
    )


def plot_curves(rows: list[Row], path: Path) -> None:
    """Draw the validation accuracy after each epoch, the mean over seeds; each data set has a panel."""
    plt = pyplot()
    drawn = [row for row in rows if any(run["curve"] for run in row.runs)]
    datasets = list(dict.fromkeys(row.dataset for row in drawn))
    figure, panels = plt.subplots(
        1, len(datasets), figsize=(6 * len(datasets), 4.5), layout="constrained", squeeze=False
    )
    models = list(dict.fromkeys(row.model for row in drawn))
    for axes, dataset in zip(panels[0], datasets, strict=True):
        for row in (row for row in drawn if row.dataset == dataset):
            epochs, values = _mean_curve([run["curve"] for run in row.runs if run["curve"]])
            style = {1: "-", 3: "--"}.get(row.ngram, ":")
            axes.plot(epochs, values, style, color=f"C{models.index(row.model)}", marker=".", label=row.label)
        axes.set(title=TITLES.get(dataset, dataset), xlabel="epochs", ylabel="validation accuracy, %")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mean_curve(curves: list[list[list[float]]]) -> tuple[list[int], list[float]]:
    """The mean over curves, at the epochs that all have."""
    tables = [{int(epoch): value for epoch, value in curve} for curve in curves]
    epochs = sorted(set.intersection(*map(set, tables)))
    return epochs, [statistics.fmean(table[epoch] for table in tables) for epoch in epochs]


def plot_confusion(rows: list[Row], path: Path) -> None:
    """Draw each model's confusion matrix on one data set, in per cent of a class (row)."""
    plt = pyplot()
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(rows) :]:
        axes.axis("off")
    classes = rows[0].runs[0]["classes"]
    for axes, row in zip(panels.flat, rows, strict=False):
        counts = [[sum(cells) for cells in zip(*lines_, strict=True)] for lines_ in zip(*_matrices(row), strict=True)]
        shares = [[100 * count / max(1, sum(line)) for count in line] for line in counts]
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set_title(f"{row.label}: {row.mean:.2f}%", fontsize=9)
        small = len(classes) > 6
        ticks = range(len(classes))
        axes.set_xticks(ticks, [k + 1 for k in ticks] if small else classes, fontsize=6, rotation=0 if small else 30)
        axes.set_yticks(ticks, classes, fontsize=5 if small else 6)
        for i, j in ((i, j) for i in ticks for j in ticks if shares[i][j] >= (1 if small else 0)):
            colour = "white" if shares[i][j] > 50 else "black"
            axes.text(j, i, f"{shares[i][j]:.0f}" if small else f"{shares[i][j]:.1f}", ha="center", va="center",
                      fontsize=4 if small else 7, color=colour)  # fmt: skip
    figure.supxlabel("classified as", fontsize=9)
    figure.supylabel("class", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _matrices(row: Row) -> list[list[list[int]]]:
    return [run["confusion"] for run in row.runs]


def plot(rows: list[Row], out: Path) -> None:
    """Draw all pictures: ``curves.png`` and ``confusion-DATASET.png``."""
    plot_curves(rows, out / "curves.png")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        plot_confusion([row for row in rows if row.dataset == dataset], out / f"confusion-{dataset}.png")


def write(runs: list[dict[str, Any]], out: Path) -> None:
    """Write ``results.md``, ``results.json`` and the pictures to the folder ``out``; print the tables."""
    rows = rows_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = write_results(out, f"{markdown(rows)}\n{caption(rows)}\n")
    write_json(out / "results.json", [run for row in rows for run in row.runs])
    pictures = ", learning curves and confusion matrices" if draw(plot, rows, out) else ""
    print(f"{text}\nTables, JSON{pictures}: {out}")
