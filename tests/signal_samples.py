"""Recordings for tests: noise in all channels, and in one of them a wave whose frequency tells the class."""

from pathlib import Path

import numpy as np

CLASSES = {"alpha": 10.0, "beta": 20.0}
"""Each class's frequency in hertz."""
RATE = 100.0
CHANNELS = ["Cz", "Pz", "Oz"]
WAVE = 1
"""The channel that has the wave."""


def waves(count: int, steps: int = 100, seed: int = 0, people: int = 4, noise: float = 1.0) -> dict[str, np.ndarray]:
    """The arrays of an .npz file: x ``(count, 3, steps)``, y, group, channels, rate."""
    draw = np.random.default_rng(seed)
    y = np.array(list(CLASSES))[np.arange(count) % len(CLASSES)]
    x = noise * draw.standard_normal((count, len(CHANNELS), steps))
    times = np.arange(steps) / RATE
    for row, label in zip(x, y, strict=True):
        row[WAVE] += 1.5 * np.sin(2 * np.pi * (CLASSES[label] * times + draw.uniform()))
    x = x * np.array([[1.0], [5.0], [20.0]]) + np.array([[0.0], [3.0], [-40.0]])
    group = np.array([f"p{number}" for number in np.arange(count) // len(CLASSES) % people])
    return {
        "x": x.astype(np.float32), "y": y, "group": group, "channels": np.array(CHANNELS), "rate": np.array(RATE),
    }  # fmt: skip


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    """Write an .npz file."""
    np.savez(path, **arrays)
    return path
