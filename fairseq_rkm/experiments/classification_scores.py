"""Test a trained classifier, and write ``RUN/result.json`` for the report.

    python -m fairseq_rkm.experiments.classification_scores RUN DATA

RUN is its ``--save-dir``, with fairseq-train's output in train.log. DATA is the folder written by prepare.py.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.classification_baselines import accuracy
from fairseq_rkm.experiments.classification_jobs import RESULT
from fairseq_rkm.experiments.classification_report import read_log
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.models import RKMClassifier


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the classifier's folder")
    parser.add_argument("data", type=Path, metavar="DATA", help="its data, with a test set")
    parser.add_argument("--checkpoint", default="checkpoint_best.pt", help="default: checkpoint_best.pt")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args()
    try:
        classifier, found = scores(args.run, args.checkpoint, args.data, args.cpu)
    except RKMError as error:
        sys.exit(f"classification_scores: {error}")
    seed = torch.load(args.run / args.checkpoint, map_location="cpu", weights_only=True)["cfg"]["common"]["seed"]
    rkm = classifier.model.rkm
    about = {"dataset": args.data.resolve().name, "model": rkm.cell, "ngram": rkm.ngram, "seed": seed}
    write_result(args.run, about, classifier.classes, found)
    print(f"test accuracy {json.loads((args.run / RESULT).read_text(encoding='utf-8'))['accuracy']:.2f}%")


def scores(folder: Path, checkpoint: str, data: Path, cpu: bool) -> tuple[Any, dict[str, Any]]:
    """Load and test a trained classifier.

    Returns:
        The classifier, and its confusion matrix, size and course of training.

    Raises:
        RKMError: the checkpoint or the data cannot be used, or the data has no test set.
    """
    classifier = RKMClassifier.from_pretrained(str(folder), checkpoint, str(data))
    if torch.cuda.is_available() and not cpu:
        classifier.cuda()
    return classifier, {
        "confusion": classifier.confusion("test").tolist(),
        "weights": classifier.model.rkm.num_weights(),
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        **read_log(folder / "train.log"),
    }


def write_result(folder: Path, about: dict[str, Any], classes: list[str], found: dict[str, Any]) -> None:
    """Write ``result.json``: the run, its results, and the circumstances.

    Args:
        folder: the run's folder.
        about: data set, model, n-gram and seed.
        classes: the names of the classes.
        found: the confusion matrix, sizes, and the course of training.
    """
    result = {
        **about,
        "classes": classes,
        "accuracy": accuracy(found["confusion"]),
        **found,
        "circumstances": circumstances(),
    }
    write_json(folder / RESULT, result, indent=None)


if __name__ == "__main__":
    main()
