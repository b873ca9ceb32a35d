"""Pictures of signal classifiers: learned filters with their spectra, and accuracy by person."""

from pathlib import Path

import numpy as np

from fairseq_rkm.experiments.result_files import pyplot

UNITS_SHOWN = 12
"""The units whose filters are drawn: those of the largest norm."""
POINTS = 512


def strongest(filters: np.ndarray, count: int = UNITS_SHOWN) -> list[tuple[int, int]]:
    """The units of the largest filters, and the channel of each on which it is largest.

    Args:
        filters: of one gate, ``(units, channels, n)``.
        count: the most units.

    Returns:
        Pairs of a unit and a channel, the largest first.
    """
    order = np.argsort(-np.square(filters).sum((1, 2)), kind="stable")[:count]
    return [(int(unit), int(np.square(filters[unit]).sum(1).argmax())) for unit in order]


def spectrum(taps: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in hertz (cycles a sample without a rate), and a filter's gain in decibels below its largest.

    Args:
        taps: ``(..., n)``.
        rate: samples a second, or 0.
    """
    gain = np.abs(np.fft.rfft(taps, n=max(POINTS, taps.shape[-1]), axis=-1))
    largest = np.maximum(gain.max(-1, keepdims=True), 1e-12)
    decibels = 20 * np.log10(np.maximum(gain / largest, 1e-3))
    return np.fft.rfftfreq(max(POINTS, taps.shape[-1]), 1 / (rate or 1.0)), decibels


def plot_filters(source: Path, title: str, path: Path) -> None:
    """Draw the candidate's filters of the strongest units, in time and in frequency.

    Args:
        source: ``filters.npz`` of a run.
        title: the model's name.
        path: the picture.
    """
    with np.load(source, allow_pickle=False) as held:
        filters, channels, rate = held["filters"], held["channels"], float(held["rate"])
        gate = held["gates"].tolist().index("candidate")
    plt = pyplot()
    chosen = strongest(filters[gate])
    figure, panels = plt.subplots(
        len(chosen), 2, figsize=(8, 1.1 * len(chosen) + 0.8), layout="constrained", squeeze=False
    )
    n = filters.shape[-1]
    times = (np.arange(n) - (n - 1) // 2) / (rate or 1.0)
    for (left, right), (unit, channel) in zip(panels, chosen, strict=True):
        left.plot(times, filters[gate, unit, channel], lw=1)
        left.set_ylabel(f"{channels[channel]}", fontsize=7, rotation=0, ha="right")
        right.plot(*spectrum(filters[gate, unit, channel], rate), lw=1)
        right.set_ylim(-40, 2)
        for axes in (left, right):
            axes.tick_params(labelsize=6)
            axes.grid(alpha=0.3)
    panels[-1][0].set_xlabel("seconds" if rate else "samples", fontsize=8)
    panels[-1][1].set_xlabel("Hz" if rate else "cycles a sample", fontsize=8)
    panels[0][0].set_title("filter, on its strongest channel", fontsize=8)
    panels[0][1].set_title("gain, dB", fontsize=8)
    figure.suptitle(f"{title}: the {len(chosen)} largest filters of the candidate", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_people(rows: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Draw each person's accuracy, a line a model; people are sorted by their mean over the models."""
    plt = pyplot()
    people = sorted(set.intersection(*(set(by_person) for _, by_person in rows)))
    people.sort(key=lambda name: np.mean([by_person[name] for _, by_person in rows]))
    figure, axes = plt.subplots(figsize=(max(6, 0.28 * len(people)), 4), layout="constrained")
    for label, by_person in rows:
        axes.plot(people, [by_person[name] for name in people], marker=".", lw=0.6, label=label)
    axes.set(xlabel="person left out", ylabel="accuracy of windows, %")
    axes.tick_params(axis="x", labelsize=6)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=100)
    plt.close(figure)
