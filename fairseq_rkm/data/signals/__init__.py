"""Recordings of several channels: readers, windows, splits, and the files that ``signal_classification`` reads."""

from fairseq_rkm.data.signals.preparation_file import SIGNALS_FILE, SignalPreparation
from fairseq_rkm.data.signals.recordings import Recordings, check_finite, joined
from fairseq_rkm.data.signals.signal_dataset import SignalDataset
from fairseq_rkm.data.signals.signal_files import read_signals
from fairseq_rkm.data.signals.signal_store import open_split, write_split
from fairseq_rkm.data.signals.splits import SPLITS, Parts, check_groups, leave_one_group_out, split_recordings
from fairseq_rkm.data.signals.whitening import WHITEN, whitened
from fairseq_rkm.data.signals.windows import Duration, resampled, scales, window_starts

__all__ = [
    "SIGNALS_FILE", "SPLITS", "WHITEN", "Duration", "Parts", "Recordings", "SignalDataset", "SignalPreparation",
    "check_finite", "check_groups", "joined", "leave_one_group_out", "open_split", "read_signals", "resampled",
    "scales", "split_recordings", "whitened", "window_starts", "write_split",
]  # fmt: skip
