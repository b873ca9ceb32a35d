"""The report of language-model runs: a table, the paper's figures beside it, and learning curves.

A run is a folder that ``fairseq-train --log-format json --save-dir RUN > RUN/train.log 2>&1`` filled. The outputs of
``fairseq-eval-lm`` may stand there too: RUN/valid.log and RUN/test.log, or RUN/valid-cache.log and RUN/test-cache.log
with a continuous cache. The report writes RUN/run.json beside them. It holds everything reported and serves as a run by
itself: the other files need not be kept.
"""

import json
import re
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.fairseq_log import parse_line, time_of
from fairseq_rkm.experiments.result_files import draw, pyplot, write_json, write_results
from fairseq_rkm.ops.cells import CELLS, resolve_cell, resolve_clip
from fairseq_rkm.ops.kernel_functions import resolve_kernel

PAPER = {
    "Penn Treebank": {
        "lstm": (61.2, 58.9),
        "rkm_lstm": (60.3, 58.2),
        "rkm_cifg": (61.9, 59.5),
        "linear_kernel_gated": (72.3, 69.7),
    },
    "WikiText-2": {
        "lstm": (68.74, 65.68),
        "rkm_lstm": (67.85, 65.22),
        "rkm_cifg": (69.12, 66.03),
        "linear_kernel_gated": (84.23, 80.21),
    },
}
"""Valid and test perplexity in Table 3 of Liang et al. (2019)."""

TEST_TOKENS = {82_430: "Penn Treebank", 245_569: "WikiText-2"}
"""The corpus, by the number of tokens of its test set."""


@dataclass
class Point:
    """A validation: the updates and seconds of training before it, and its perplexity."""

    updates: int
    seconds: float
    perplexity: float


@dataclass
class Run:
    """A run's figures; None stands for a figure that its folder lacks."""

    name: str
    cell: str
    variant: str
    corpus: str | None
    weights: int
    parameters: int
    seed: int
    updates: int
    epochs: float | None
    valid_perplexity: float | None
    test_perplexity: float | None
    cached_valid_perplexity: float | None
    cached_test_perplexity: float | None
    tokens_per_second: float | None
    seconds: float | None
    circumstances: dict[str, Any]
    curve: list[Point] = field(default_factory=list)

    @property
    def paper(self) -> tuple[float, float] | None:
        """The paper's figures for this corpus and cell, both with feedback; None if there are none."""
        if "no feedback" in self.variant:
            return None
        return PAPER.get(self.corpus or "", {}).get(self.cell)

    @property
    def label(self) -> str:
        """The cell and its variant."""
        return f"{self.cell}, {self.variant}" if self.variant else self.cell


def read_run(path: Path) -> Run:
    """Read a run's folder, or its run.json.

    Raises:
        SystemExit: the log or the checkpoint is missing, or the file is not a run's.
    """
    if path.suffix == ".json":
        return _from_json(path)
    log, checkpoint = path / "train.log", path / "checkpoint_best.pt"
    for file in (log, checkpoint):
        if not file.is_file():
            raise SystemExit(
                f"report: {file} is missing: give the --save-dir of a finished run, or a folder with result.json files"
            )
    try:
        training, curve, seconds = read_log(log.read_text(encoding="utf-8"))
    except KeyError as error:
        raise SystemExit(f"report: {log} is not a language model's log: it has no {error} in a validation") from error
    if not training and not curve:
        raise SystemExit(f"report: {log} has no line of training or validation: train with --log-format json")
    speeds = sorted(float(entry["wps"]) for entry in training[1:])
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = state["cfg"]["model"]
    shapes = {name: p.numel() for name, p in state["model"].items() if "output_projection.weight" not in name}
    noted = path / "circumstances.json"
    tokens, test = _evaluation(path / "test.log")
    return Run(
        name=path.name,
        cell=str(model["cell"]),
        variant=_variant(state["cfg"]),
        corpus=TEST_TOKENS.get(tokens),
        weights=sum(n for name, n in shapes.items() if re.search(r"layers\.\d+\.weight_[ih]h", name)),
        parameters=sum(n for name, n in shapes.items() if "fingerprint" not in name),
        seed=int(state["cfg"]["common"]["seed"]),
        updates=int(training[-1]["num_updates"]) if training else curve[-1].updates,
        epochs=float(training[-1]["update"]) if training else None,
        valid_perplexity=_evaluation(path / "valid.log")[1] or min((p.perplexity for p in curve), default=None),
        test_perplexity=test,
        cached_valid_perplexity=_evaluation(path / "valid-cache.log")[1],
        cached_test_perplexity=_evaluation(path / "test-cache.log")[1],
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        seconds=seconds if training else None,
        circumstances=json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else circumstances(),
        curve=curve,
    )


def read_log(text: str) -> tuple[list[dict[str, str]], list[Point], float]:
    """Read a log's training intervals and validations, and the seconds of both together.

    Time starts when fairseq is ready to train. The sessions of a resumed run add up.
    """
    training: list[dict[str, str]] = []
    curve: list[Point] = []
    earlier = seconds = 0.0
    began: datetime | None = None
    for line in text.splitlines():
        now = time_of(line)
        if now is None:
            continue
        if "| training on " in line:
            earlier, began = seconds, now
        kind, entry = parse_line(line)
        if not entry:
            continue
        seconds = earlier + (now - (began or now)).total_seconds()
        if kind == "train_inner":
            training.append(entry)
        elif kind == "valid":
            curve.append(Point(int(entry["valid_num_updates"]), seconds, float(entry["valid_ppl"])))
    return training, curve, seconds


def _from_json(path: Path) -> Run:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Run(**{**values, "curve": [Point(**point) for point in values["curve"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(f"report: {path} is not a run.json of the report's: {error}") from error


REGULARISERS = (
    ("task", "partial_shuffle", False, "partial shuffle"),
    ("task", "overlap", 1, "overlap {}"),
    ("criterion", "past_decode", 0, "past decode {}"),
    ("model", "skip_connections", False, "skip connections"),
    ("model", "dropout_state", 0, "state dropout {}"),
    ("model", "softmaxes", 1, "{} softmaxes"),
)
"""Section, flag, default and words of the regularisers beside dropout, AR and TAR."""


def _variant(cfg: dict[str, Any]) -> str:
    flags = cfg["model"]
    parts = [text for key, text in (("layer_norm", "layer norm"), ("no_feedback", "no feedback")) if flags.get(key)]
    clip = _clip(flags)
    if clip is not None:
        parts.append(f"memory clip {clip:g}")
    if flags.get("kernel", "linear") != "linear":
        degree = flags.get("kernel_degree")
        parts.append(f"{flags['kernel']} kernel{'' if degree is None else f' of degree {degree}'}")
    # A number, a list of one for each layer, or the command line's text of either.
    numbers = re.findall(r"\d+", str(flags.get("ngram", 1)))
    if set(numbers) != {"1"}:
        parts.append(f"{', '.join(numbers)}-gram")
    for section, flag, default, words in REGULARISERS:
        value = (cfg.get(section) or {}).get(flag, default)
        if value != default:
            parts.append(words.format(value))
    return ", ".join(parts)


def _clip(flags: dict[str, Any]) -> float | None:
    """The memory's bound. Older runs did not note it: presets of ``rkm_lm`` had one, and the others none."""
    setting = flags.get("memory_clip")
    if setting is None and str(flags.get("_name")).startswith("rkm_lm_"):
        setting = "auto"
    if flags.get("cell") not in CELLS:
        return None
    cell = resolve_cell(flags["cell"], False if flags.get("no_feedback") else None)
    cell = cell.through(resolve_kernel(flags.get("kernel") or "linear", flags.get("kernel_degree")))
    return resolve_clip(setting, cell, bool(flags.get("layer_norm")))


def _evaluation(log: Path) -> tuple[int, float | None]:
    """The number of tokens that fairseq-eval-lm scored, and their perplexity; 0 and None without a log."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    tokens = re.findall(r"Evaluated ([\d,]+) tokens", text)
    perplexity = re.findall(r"Perplexity: ([\d.]+)", text)
    return int(tokens[-1].replace(",", "")) if tokens else 0, float(perplexity[-1]) if perplexity else None


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def markdown(runs: list[Run]) -> str:
    """The runs as a table without empty columns; a mean and spread follow runs that differ in their seed."""
    columns: list[tuple[str, Any]] = [
        ("cell", lambda r: r.label),
        ("weights", lambda r: f"{r.weights:,}"),
        ("valid perplexity", lambda r: _number(r.valid_perplexity)),
        ("test perplexity", lambda r: _number(r.test_perplexity)),
        ("with cache", lambda r: _number(r.cached_test_perplexity)),
        ("paper, valid / test", lambda r: "{} / {}".format(*r.paper) if r.paper else ""),
        ("epochs", lambda r: "" if r.epochs is None else f"{r.epochs:.1f}"),
        ("time (min:s)", lambda r: _minutes(r.seconds)),
        ("tokens/s", lambda r: _number(r.tokens_per_second, ",.0f")),
        ("seed", lambda r: str(r.seed)),
        ("recipe", lambda r: r.circumstances.get("config") or ""),
    ]
    columns = [(title, text) for title, text in columns if any(text(run) for run in runs)]
    rows = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
    ]
    for _, group in groupby(runs, key=_row):
        members = list(group)
        rows += ["| " + " | ".join(text(run) for _, text in columns) + " |" for run in members]
        # Runs of one seed differ in something outside the table: they have no mean.
        if len({run.seed for run in members}) == len(members) > 1:
            summary = {
                "cell": f"{members[0].label}, mean (spread)",
                "valid perplexity": _spread([run.valid_perplexity for run in members]),
                "test perplexity": _spread([run.test_perplexity for run in members]),
                "with cache": _spread([run.cached_test_perplexity for run in members]),
                "seed": f"{len(members)} seeds",
            }
            rows.append("| " + " | ".join(summary.get(title, "") for title, _ in columns) + " |")
    return "\n".join(rows)


def _row(run: Run) -> tuple[str, ...]:
    """A key that is equal for runs that differ in their seed alone."""
    return run.corpus or "", str(run.circumstances.get("config")), run.label, str(run.weights)


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.2f} ({statistics.stdev(known):.2f})" if len(known) > 1 else ""


def caption(runs: list[Run]) -> str:
    """Machine, commit and seeds, each named once for all runs that agree."""
    lines: dict[str, list[Run]] = {}
    for run in runs:
        about = run.circumstances
        machine = f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}"
        lines.setdefault(machine, []).append(run)
    texts = []
    for machine, members in lines.items():
        seeds = ", ".join(sorted({str(run.seed) for run in members}))
        names = "" if len(lines) == 1 else ", ".join(run.name for run in members) + ": "
        texts.append(f"{names}{machine}, seed {seeds}.")
    return "\n".join(texts)


def plot(runs: list[Run], path: Path) -> None:
    """Draw the validation perplexity over updates and over time into the file ``path``."""
    plt = pyplot()
    colours = plt.get_cmap("tab20" if len(runs) > 10 else "tab10")
    figure, (by_update, by_time) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes in (by_update, by_time):
        axes.set_prop_cycle(color=[colours(i) for i in range(len(runs))])
    shared = [label for label, count in Counter(run.label for run in runs).items() if count > 1]
    for run in runs:
        values = [point.perplexity for point in run.curve]
        label = f"{run.label} ({run.name})" if run.label in shared else run.label
        by_update.plot([p.updates for p in run.curve], values, marker=".", label=label)
        by_time.plot([p.seconds / 60 for p in run.curve], values, marker=".")
    all_values = [point.perplexity for run in runs for point in run.curve]
    lowest, highest = min(all_values), max(all_values)
    limits = 0.97 * lowest, min(4 * lowest, 1.05 * highest)
    by_update.set(xlabel="updates", ylabel="validation perplexity", yscale="log", ylim=limits)
    by_time.set(xlabel="minutes of training and validation")
    by_update.yaxis.set_major_formatter("{x:.0f}")
    by_update.yaxis.set_minor_formatter("{x:.0f}")
    for axes in (by_update, by_time):
        axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(paths: list[Path], out: Path) -> str:
    """Write ``results.md``, ``results.json`` and ``curves.png`` of runs, and a run.json in each run's folder.

    Returns:
        The table and its caption; they are printed too.

    Raises:
        SystemExit: as :func:`read_run`.
    """
    runs = [read_run(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if path.is_dir():
            write_json(path / "run.json", asdict(run))
    out.mkdir(parents=True, exist_ok=True)
    runs.sort(key=_row)
    text = write_results(out, f"{markdown(runs)}\n\n{caption(runs)}\n")
    write_json(out / "results.json", {"runs": [asdict(run) for run in runs]})
    drawn = [run for run in runs if run.curve]
    pictures = ", curves.png" if drawn and draw(plot, drawn, out / "curves.png") else ""
    print(f"{text}Table, JSON and learning curves: {out}/results.md, results.json{pictures}")
    return text
