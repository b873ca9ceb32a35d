"""The report of translation models: each model and pair of languages has a row, the mean over its seeds."""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments.result_files import draw, pyplot, write_json, write_results


def group(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group runs by model and pair of languages; the best BLEU on the first test set comes first."""
    keys = sorted({(run["languages"], run["model"]) for run in runs})
    rows = []
    for languages, model in keys:
        mine = [run for run in runs if (run["languages"], run["model"]) == (languages, model)]
        speeds = [run["speed"] for run in mine if run["speed"]]
        rows.append(
            {
                "languages": languages,
                "model": model,
                "seeds": sorted(run["seed"] for run in mine),
                "parameters": mine[0]["parameters"],
                "bleu": {test: [run["bleu"][test] for run in mine] for test in mine[0]["bleu"]},
                "minutes": statistics.mean(run["minutes"] for run in mine),
                "training_tokens_per_second": _median(speeds, "training_tokens_per_second"),
                "generation_sentences_per_second": _median(speeds, "generation_sentences_per_second"),
            }
        )
    return sorted(rows, key=lambda row: (row["languages"], -statistics.mean(_first(row))))


def _first(row: dict[str, Any]) -> list[float]:
    """The scores on the first test set."""
    return next(iter(row["bleu"].values()))


def _median(speeds: list[dict[str, Any]], name: str) -> float | None:
    return statistics.median(speed[name] for speed in speeds) if speeds else None


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation of several values, as text."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; a figure that was not measured has an empty place."""
    tests = list(rows[0]["bleu"])
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "languages": lambda row: row["languages"],
        "model": lambda row: f"`{row['model']}`",
        "parameters": lambda row: f"{row['parameters']:,}",
        **{f"BLEU, {test}": partial(_bleu, test) for test in tests},
        "seeds": lambda row: str(len(row["seeds"])),
        "training, minutes": lambda row: f"{row['minutes']:.1f}",
        "training, tokens/s": lambda row: _number(row["training_tokens_per_second"]),
        "generation, sentences/s": lambda row: _number(row["generation_sentences_per_second"]),
    }
    aligned = ["---" if name in {"languages", "model"} else "---:" for name in columns]
    lines = [" | ".join(columns), " | ".join(aligned)]
    lines += [" | ".join(show(row) for show in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _bleu(test: str, row: dict[str, Any]) -> str:
    return spread(row["bleu"].get(test, []))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def samples(data: Path, out: Path, models: list[str], count: int = 5) -> str:
    """Sentences spread over the first test set: source, reference, and the translations of the models' first seeds.

    Args:
        data: the folder that ``translation_data`` wrote.
        out: the folder of the runs.
        models: their names, in order.
        count: the number of sentences.

    Raises:
        SystemExit: a file is missing.
    """
    try:
        languages = json.loads((data / "data.json").read_text(encoding="utf-8"))["languages"]
        columns = {language: _lines(data / "raw" / f"test.{language}") for language in languages}
        columns |= {f"`{model}`": _lines(min(out.glob(f"{model}-[0-9]*")) / "test.txt") for model in models}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"report: no sample translations of {data} in {out}: {error}") from error
    size = len(columns[languages[0]])
    blocks = [
        "\n".join(f"- {name}: {lines[size * k // count]}" for name, lines in columns.items())
        for k in range(min(count, size))
    ]
    return "\n\n".join(f"Sentence {k}\n\n{block}" for k, block in enumerate(blocks, 1))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def caption(runs: list[dict[str, Any]]) -> str:
    """The circumstances of the figures, in words."""
    about = sorted({f"{c['hardware']}, torch {c['torch']}, commit {c['commit']}" for c in _circumstances(runs)})
    signatures = sorted({run["signature"] for run in runs})
    return f"sacrebleu {'; '.join(signatures)}. {'; '.join(about)}."


def _circumstances(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run["circumstances"] for run in runs] + [run["speed"]["circumstances"] for run in runs if run["speed"]]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw BLEU on the first test set into the file ``path``, a point for each seed."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    labels = [f"{row['model']}, {row['languages']}" for row in rows]
    for height, row in enumerate(rows):
        scores = _first(row)
        axes.plot(scores, [height] * len(scores), "o", color="C0", alpha=0.6)
        axes.plot(statistics.mean(scores), height, "|", color="black", markersize=14)
    axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel=f"BLEU, {next(iter(rows[0]['bleu']))}")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(runs: list[dict[str, Any]], out: Path, sampled: tuple[Path, Path] | None = None) -> None:
    """Write ``results.md``, ``results.json`` and ``bleu.png``; print the table.

    Args:
        runs: a ``result.json`` each; ``speed`` holds its ``speed.json``, or None.
        out: the folder to write to.
        sampled: the folders of the data and of the runs, for sample translations in ``results.md``; None for none.

    Raises:
        SystemExit: a file of the samples is missing.
    """
    rows = group(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = f"{markdown(rows)}\n\n{caption(runs)}\n"
    if sampled:
        text += f"\n{samples(*sampled, [row['model'] for row in rows])}\n"
    text = write_results(out, text)
    write_json(out / "results.json", {"rows": rows, "runs": runs}, indent=2)
    draw(plot, rows, out / "bleu.png")
    print(text)
