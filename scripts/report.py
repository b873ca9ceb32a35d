"""Tabulate runs: Markdown, JSON and learning curves.

    python scripts/report.py RUN [RUN ...] --out FOLDER

A run is a folder with what ``fairseq-train --log-format json --save-dir RUN > RUN/train.log 2>&1`` left, and, if
``fairseq-eval-lm``'s output was kept likewise, RUN/valid.log and RUN/test.log. Writes FOLDER/results.md, results.json
and curves.png, and prints the table.

Folders with results of examples/document_classification/table.py give its tables: see classification_report.py.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import classification_report
import torch


@dataclass
class Run:
    """What is known of a run; None where its folder does not tell."""

    name: str
    cell: str
    weights: int
    parameters: int
    seed: int
    updates: int
    valid_perplexity: float | None
    test_perplexity: float | None
    tokens_per_second: float | None
    seconds: float | None
    curve: list[tuple[int, float]] = field(default_factory=list)


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """The logger's name and the JSON of a line of fairseq's log; empty for other lines."""
    found = re.search(r"\| INFO \| (\w+) \| (\{.*\})\s*$", line)
    try:
        return (found[1], json.loads(found[2])) if found else ("", {})
    except json.JSONDecodeError:
        return "", {}


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        SystemExit: no log or no checkpoint there.
    """
    log, checkpoint = folder / "train.log", folder / "checkpoint_best.pt"
    for path in (log, checkpoint):
        if not path.is_file():
            raise SystemExit(f"report: {path} is missing: give the --save-dir of a finished run")
    entries = [parse_line(line) for line in log.read_text(encoding="utf-8").splitlines()]
    training = [entry for kind, entry in entries if kind == "train_inner"]
    curve = [(int(e["valid_num_updates"]), float(e["valid_ppl"])) for kind, e in entries if kind == "valid"]
    speeds = sorted(float(entry["wps"]) for entry in training[1:])
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = state["cfg"]["model"]
    shapes = {name: p.numel() for name, p in state["model"].items() if "output_projection.weight" not in name}
    return Run(
        name=folder.name,
        cell=str(model["cell"]),
        weights=sum(n for name, n in shapes.items() if re.search(r"layers\.\d+\.weight_[ih]h", name)),
        parameters=sum(n for name, n in shapes.items() if "fingerprint" not in name),
        seed=int(state["cfg"]["common"]["seed"]),
        updates=int(training[-1]["num_updates"]) if training else 0,
        valid_perplexity=_perplexity(folder / "valid.log") or min((ppl for _, ppl in curve), default=None),
        test_perplexity=_perplexity(folder / "test.log"),
        tokens_per_second=speeds[len(speeds) // 2] if speeds else None,
        seconds=float(training[-1]["wall"]) if training else None,
        curve=curve,
    )


def _perplexity(log: Path) -> float | None:
    found = re.findall(r"Perplexity: ([\d.]+)", log.read_text(encoding="utf-8")) if log.is_file() else []
    return float(found[-1]) if found else None


def markdown(runs: list[Run]) -> str:
    """The runs as a table."""
    rows = ["| cell | weights | valid perplexity | test perplexity | tokens/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for run in runs:
        speed = "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        figures = [f"{value:.2f}" if value else "" for value in (run.valid_perplexity, run.test_perplexity)]
        rows.append(f"| {run.cell} | {run.weights:,} | {figures[0]} | {figures[1]} | {speed} |")
    return "\n".join(rows)


def circumstances() -> dict[str, Any]:
    """What a figure must be read with."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    return {
        "commit": commit.stdout.strip() or "unknown",
        "hardware": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    return names[0] if names else platform.processor() or platform.machine()


def plot(runs: list[Run], path: Path) -> None:
    """Validation perplexity over updates."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run in runs:
        axes.plot(*zip(*run.curve, strict=True), marker=".", label=f"{run.name} ({run.weights:,} weights)")
    axes.set(xlabel="updates", ylabel="validation perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's --save-dir")
    parser.add_argument("--out", type=Path, required=True, help="where results.md, results.json and curves.png go")
    args = parser.parse_args()
    classifiers = classification_report.find(args.runs)
    if classifiers:
        classification_report.write(classifiers, args.out)
        return
    runs = [read_run(folder) for folder in args.runs]
    args.out.mkdir(parents=True, exist_ok=True)
    about = circumstances()
    table = markdown(runs)
    caption = f"{about['hardware']}, {about['threads']} threads, torch {about['torch']}, commit {about['commit']}, "
    caption += f"seed {', '.join(sorted({str(run.seed) for run in runs}))}."
    (args.out / "results.md").write_text(f"{table}\n\n{caption}\n", encoding="utf-8")
    results = {"circumstances": about, "runs": [asdict(run) for run in runs]}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    drawn = [run for run in runs if run.curve]
    if drawn:
        plot(drawn, args.out / "curves.png")
    print(f"{table}\n\n{caption}\nTable, JSON and learning curves: {args.out}/results.md, results.json, curves.png")


if __name__ == "__main__":
    main()
