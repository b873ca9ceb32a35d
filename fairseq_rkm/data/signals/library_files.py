"""Recordings in files that other libraries read: .ts by aeon, epochs of EEG and MEG (-epo.fif) by MNE."""

from pathlib import Path
from typing import Any

import numpy as np

from fairseq_rkm.data.signals.array_files import from_arrays
from fairseq_rkm.data.signals.recordings import Recordings
from fairseq_rkm.errors import RKMError, first_line

GROUP_COLUMNS = ("group", "subject", "participant", "person")
"""Columns of MNE's metadata that hold groups; the first one that is there is read."""


def read_ts(path: Path) -> Recordings:
    """Read a file of the time series archives. Classes are the file's; it knows no groups and no sampling rate.

    Raises:
        RKMError: aeon is not installed, or it cannot read the file.
    """
    try:
        from aeon.datasets import load_from_ts_file
    except ImportError:
        raise RKMError(f"{path}: .ts files are read by aeon, which is not installed: pip install aeon") from None
    try:
        x, y, meta = load_from_ts_file(str(path), return_meta_data=True)
    except Exception as error:  # noqa: BLE001  the reader raises many kinds of errors for damaged files
        raise RKMError(f"{path} cannot be read as a .ts file: {first_line(error)}") from None
    if meta.get("targetlabel"):
        raise RKMError(f"{path} has numbers to be predicted (@targetlabel), not classes")
    labels = y if meta.get("classlabel") else None
    return from_arrays(str(path), list(x), labels)


def read_fif(path: Path) -> Recordings:
    """Read MNE's epochs, each a recording. Its class is its event's name; its group is in a column of the metadata.

    Raises:
        RKMError: MNE is not installed, or it cannot read the file.
    """
    try:
        import mne
    except ImportError:
        raise RKMError(f"{path}: epochs are read by MNE, which is not installed: pip install mne") from None
    try:
        epochs = mne.read_epochs(path, preload=True, verbose="error")
        x = epochs.get_data(copy=False)
    except Exception as error:  # noqa: BLE001  the reader raises many kinds of errors for damaged files
        raise RKMError(f"{path} cannot be read as MNE's epochs (-epo.fif): {first_line(error)}") from None
    names = {number: name for name, number in epochs.event_id.items()}
    labels = np.array([names[number] for number in epochs.events[:, 2]])
    return from_arrays(str(path), x, labels, _groups(epochs), np.array(epochs.ch_names), epochs.info["sfreq"])


def _groups(epochs: Any) -> np.ndarray | None:
    columns = [] if epochs.metadata is None else list(epochs.metadata.columns)
    found = next((name for name in GROUP_COLUMNS if name in columns), None)
    return None if found is None else np.array([str(value) for value in epochs.metadata[found]])
