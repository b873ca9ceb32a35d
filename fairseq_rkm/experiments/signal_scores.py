"""Test a trained classifier of signals on the test part of its data, and write ``result.json`` into its folder.

python -m fairseq_rkm.experiments.signal_scores RUN DATA
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_rkm.data.signals import open_split
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.classification_report import read_log
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.signal_folds import Fold, Windows
from fairseq_rkm.experiments.signal_jobs import RESULT
from fairseq_rkm.experiments.signal_run import confusion, recording_votes, write_filters
from fairseq_rkm.models import RKMSignalClassifier


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the classifier's folder")
    parser.add_argument("data", type=Path, metavar="DATA", help="its data, with a test part")
    parser.add_argument("--checkpoint", default="checkpoint_best.pt", help="default: checkpoint_best.pt")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args(arguments)
    try:
        result = scores(args.run, args.checkpoint, args.data, args.cpu)
    except RKMError as error:
        sys.exit(f"signal_scores: {error}")
    write_json(args.run / RESULT, result, indent=None)
    (fold,) = result["folds"]
    right = sum(row[k] for k, row in enumerate(fold["confusion"]))
    print(f"test accuracy {100 * right / sum(map(sum, fold['confusion'])):.2f}%")


def scores(run: Path, checkpoint: str, data: Path, cpu: bool) -> dict[str, Any]:
    """Load and test a trained classifier; its filters go into ``filters.npz``.

    Raises:
        RKMError: the checkpoint or the data cannot be used, or the data has no test part.
    """
    classifier = RKMSignalClassifier.from_pretrained(str(run), checkpoint, str(data))
    if torch.cuda.is_available() and not cpu:
        classifier.cuda()
    split = open_split(data, "test", classifier.preparation.width, len(classifier.classes))
    pieces = [
        torch.from_numpy(np.array(split.values[start : start + length]))
        for start, length in zip(split.starts, split.lengths, strict=True)
    ]
    found = classifier.classified(pieces)
    labels = torch.from_numpy(split.labels)
    none = torch.empty(0)
    windows = Windows(none, none, labels, split.recordings, classifier.classes)
    every = np.arange(len(pieces))
    recordings, right = recording_votes(windows, Fold("test", every[:0], every, every[:0], every[:0]), found)
    rkm, preparation = classifier.model.rkm, classifier.preparation
    channels = preparation.channels or [str(number + 1) for number in range(preparation.width)]
    write_filters(classifier.model.cpu(), channels, preparation.rate, run)
    log = read_log(run / "train.log") if (run / "train.log").is_file() else {"curve": [], "seconds_per_epoch": None}
    held = torch.load(run / checkpoint, map_location="cpu", weights_only=True)["cfg"]["common"]["seed"]
    return {
        "dataset": data.resolve().name, "model": rkm.cell, "ngram": rkm.ngram, "seed": held,
        "classes": classifier.classes, "by_group": False,
        "folds": [{"name": "test", "confusion": confusion(labels, found.argmax(1), len(classifier.classes)),
                   "recordings": recordings, "recordings_right": right}],
        "weights": rkm.num_weights(), "epochs": len(log["curve"]),
        "seconds": (log["seconds_per_epoch"] or 0) * len(log["curve"]), "circumstances": circumstances(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
