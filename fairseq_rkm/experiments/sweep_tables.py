"""What a sweep found: its rows as Markdown, as heat maps, and as sentences about the slowest fields."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fairseq_rkm.experiments.result_files import pyplot
from fairseq_rkm.experiments.sweep_measurement import FLASHRNN, OUT_OF_MEMORY, PRECISIONS, WRONG

Row = dict[str, Any]

KINDS = {"eager": "as PyTorch runs it", "graph": "as CUDA graphs"}
"""The ways in which a field is timed."""
SLOWER = 1.1
"""How many times the best backend's time ``auto`` may take."""


def title(row: Row) -> str:
    """The contender's name and circumstances, which all fields of a table share."""
    if row["backend"] == FLASHRNN:
        name = "FlashRNN's LSTM"
    else:
        bound = {"auto": "", "none": ", not clipped"}.get(row["memory_clip"], f", clipped at {row['memory_clip']}")
        name = f"{row['cell']}{'' if row['feedback'] else ' without feedback'}{bound}, backend {row['backend']}"
    return f"{name}: {row['precision']}, T {row['length']}"


def tables(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows by :func:`title`, feedback and precisions in the order of :data:`PRECISIONS` first."""
    order = list(PRECISIONS)
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: (not r["feedback"], order.index(r["precision"]), r["size"], r["batch"])):
        found.setdefault(title(row), []).append(row)
    return found


def short(row: Row, kind: str) -> str:
    """A field in a few letters: the ratio, or the reason why there is none."""
    if f"{kind}_ratio" in row:
        return f"{row[f'{kind}_ratio']:.2f}"
    failure = row.get("failure") or (row.get("graph_failure") if kind == "graph" else None)
    if failure is None:
        return "alone" if kind in row else "-"
    for beginning, word in ((OUT_OF_MEMORY, "memory"), (WRONG, "wrong"), ("backend", "refused")):
        if failure.startswith(beginning):
            return word
    return "failed"


def markdown(rows: Iterable[Row]) -> str:
    """Tables of speeds relative to ``nn.LSTM``, eager / as graphs, with the backends' names; d down, B across."""
    parts = []
    for name, fields in tables(rows).items():
        sizes, batches = (sorted({row[key] for row in fields}) for key in ("size", "batch"))
        at = {(row["size"], row["batch"]): row for row in fields}
        lines = [f"**{name}**", "", f"| d | {' | '.join(f'B {batch}' for batch in batches)} |"]
        lines.append("| ---: " * (1 + len(batches)) + "|")
        for size in sizes:
            found = (at.get((size, batch)) for batch in batches)
            lines.append(f"| {size} | {' | '.join('' if row is None else _entry(row) for row in found)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _entry(row: Row) -> str:
    values = [short(row, kind) for kind in KINDS]
    if row.get("failure"):
        return values[0]
    return f"{' / '.join(value for value in values if value != '-')} {row['picked']}"


def line(row: Row) -> str:
    """A field in one line, with its times."""
    start = f"d {row['size']}, B {row['batch']}, {title(row)}"
    if row.get("failure"):
        return f"{start}: {row['failure']}"
    parts = [f"{start}: {row['picked']}, off by {row['error']:.1e}"]
    for kind, name in KINDS.items():
        if kind not in row:
            continue
        text = f"{name} {row[kind]['median_ms']:.3f} ms"
        lstm = row["lstm"].get(kind)
        parts.append(text if lstm is None else f"{text} against {lstm['median_ms']:.3f}, {row[f'{kind}_ratio']:.2f}x")
    failures = {row.get("graph_failure"): "no graph", row["lstm"].get("failure"): "nn.LSTM"}
    return "; ".join([*parts, *(f"{what}: {failure}" for failure, what in failures.items() if failure)])


def summary(rows: Iterable[Row]) -> str:
    """Sentences: of how many fields each table reaches 1.0 and 1.15, and its slowest."""
    lines = []
    for name, fields in tables(rows).items():
        for kind, how in KINDS.items():
            ratios = sorted(
                (row[f"{kind}_ratio"], row["size"], row["batch"]) for row in fields if f"{kind}_ratio" in row
            )
            if ratios:
                above = [sum(ratio >= least for ratio, *_ in ratios) for least in (1.0, 1.15)]
                slowest = ", ".join(f"{ratio:.2f} (d {size}, B {batch})" for ratio, size, batch in ratios[:3])
                lines.append(
                    f"{name}, {how}: {above[0]} of {len(ratios)} fields at 1.0 or more, {above[1]} at 1.15 or more; "
                    f"the slowest {slowest}"
                )
    return "\n".join(lines)


def regrets(rows: Iterable[Row]) -> list[str]:
    """A sentence for each field in which ``auto`` takes more than :data:`SLOWER` times the best backend's time."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["backend"] != FLASHRNN:
            key = tuple(row[k] for k in ("length", "size", "batch", "precision", "cell", "feedback", "memory_clip"))
            groups.setdefault(key, []).append(row)
    found = []
    for group in groups.values():
        auto = next((row for row in group if row["backend"] == "auto"), None)
        for kind, how in KINDS.items():
            timed = [row for row in group if kind in row]
            if auto is None or kind not in auto:
                continue
            best = min(timed, key=lambda row: row[kind]["median_ms"])
            times = auto[kind]["median_ms"] / best[kind]["median_ms"]
            if times > SLOWER:
                found.append(
                    f"d {auto['size']}, B {auto['batch']}, {title(auto)}, {how}: {auto['picked']} takes {times:.2f} "
                    f"times as long as {best['picked']}"
                )
    return found


def heat_maps(rows: list[Row], path: Path) -> None:
    """Draw all tables into a PNG: a line of maps each, eager and as graphs; the more green the faster, 1 is yellow.

    Raises:
        RKMError: matplotlib is not installed.
    """
    plt = pyplot()
    found = tables(rows)
    kinds = [kind for kind in KINDS if any(kind in row for row in rows)] or ["eager"]
    widest, tallest = (max(len({row[key] for row in fields}) for fields in found.values()) for key in ("size", "batch"))
    figure, axes = plt.subplots(
        len(found), len(kinds), squeeze=False, layout="constrained",
        figsize=(len(kinds) * max(5, 1.2 + 0.75 * widest), 1 + len(found) * (1 + 0.42 * tallest)),
    )  # fmt: skip
    for line_of_axes, (name, fields) in zip(axes, found.items(), strict=True):
        for ax, kind in zip(line_of_axes, kinds, strict=True):
            _heat_map(ax, fields, kind)
            ax.set_title(f"{name},\n{KINDS[kind]}", fontsize=8)
    machines = sorted({f"{row['hardware']}, torch {row['torch']}, commit {row['commit']}" for row in rows})
    figure.suptitle("\n".join(["times nn.LSTM's speed, forward and backward", *machines]), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


def _heat_map(ax: Any, fields: list[Row], kind: str) -> None:
    sizes, batches = (sorted({row[key] for row in fields}) for key in ("size", "batch"))
    colours = [[math.nan] * len(sizes) for _ in batches]
    for row in fields:
        column, at = sizes.index(row["size"]), batches.index(row["batch"])
        text = short(row, kind)
        if f"{kind}_ratio" in row:
            colours[at][column] = math.log2(row[f"{kind}_ratio"])
            text += f"\n{row['picked']}"
        ax.text(column, at, text, ha="center", va="center", fontsize=6.5)
    ax.set_facecolor("lightgrey")
    ax.imshow(colours, cmap="RdYlGn", vmin=-2, vmax=2, aspect="auto")
    ax.set_xticks(range(len(sizes)), sizes)
    ax.set_yticks(range(len(batches)), batches)
    ax.set_xlabel("d")
    ax.set_ylabel("B")
