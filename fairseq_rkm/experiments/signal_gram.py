"""Classify signals by the untrained recurrent machine: its Gram matrix and an SVM, beside logistic regression.

    python examples/signals/gram.py --datasets JapaneseVowels --kernels linear gaussian arccos --poolings last mean

Data sets, windows and folds are those of examples/signals/table.py, so that its rows can be compared. Channels have
mean 0 and standard deviation 1 in a fold's training part. The matrix is normalised, so that each window has length 1,
and an SVM is trained on it. Its C is the best of 1, 10 and 100 for a fifth of the training windows. A Gaussian's s is
the steps' typical length unless ``--scale`` names another. Logistic regression sees each channel's mean and standard
deviation over a window. Of an archive's set all seeds would be the same, and one counts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.gram_baseline import accuracy, normalised, parameters
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.signal_baselines import labels_of
from fairseq_rkm.experiments.signal_folds import Fold, Windows
from fairseq_rkm.experiments.signal_jobs import SET_TITLES
from fairseq_rkm.experiments.signal_run import Experiment, load
from fairseq_rkm.kernels import POOLINGS, recurrent_gram
from fairseq_rkm.ops.kernel_functions import KERNELS


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    rows = []
    try:
        for dataset in args.datasets:
            experiment = load(args, dataset)
            for row in rows_of(dataset, experiment, args):
                rows.append(row)
                print(
                    f"{row['dataset']}, {row['model']:30} {row['accuracy']:6.2f}%  {row['seconds']:7.1f} s", flush=True
                )
    except RKMError as error:
        sys.exit(f"gram: error: {error}")
    if args.out:
        flags = {name: str(value) for name, value in vars(args).items()}
        write_json(args.out, {"rows": rows, "flags": flags, "circumstances": circumstances()})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("../shared/data"), help="folder of eeg_mental_arithmetic")
    add("--datasets", nargs="+", default=["JapaneseVowels"], choices=list(SET_TITLES), help="default: JapaneseVowels")
    add("--groups", type=int, help="leave out only so many groups, the first (default: all)")
    add("--kernels", nargs="+", choices=list(KERNELS), default=["linear", "gaussian", "arccos"])
    add("--degree", type=int, help="of polynomial and arccos")
    add("--scale", type=float, help="s of polynomial and gaussian")
    add("--sigma-f2", type=float, nargs="+", default=[0.5], help="the weight of the past (default: 0.5)")
    add("--ngram", type=int, default=1, help="samples that a step sees (default: 1)")
    add("--poolings", nargs="+", choices=POOLINGS, default=["mean"], help="default: mean")
    add("--device", default="cpu", help="where the matrices are computed (default: cpu)")
    add("--out", type=Path, help="a JSON file for the results")
    # One seed: there is nothing random. The table's recipes are for what is trained.
    parser.set_defaults(seeds=[1], changes={})
    args = parser.parse_args(arguments)
    if args.groups is not None and args.groups < 1:
        parser.error(f"--groups must be at least 1, not {args.groups}")
    return args


def rows_of(dataset: str, experiment: Experiment, args: argparse.Namespace) -> Any:
    """A row for logistic regression, then one for each kernel, pooling and weight of the past, as they come."""
    windows, folds = experiment.windows, experiment.folds

    def row(model: str, found: list[tuple[float, float]]) -> dict[str, Any]:
        rights, seconds = zip(*found, strict=True)
        return {"dataset": dataset, "model": model, "accuracy": statistics.fmean(rights), "seconds": sum(seconds)}

    yield row("logistic regression", [logistic_regression(windows, fold) for fold in folds])
    for kernel in args.kernels:
        for pooling in args.poolings:
            for past in args.sigma_f2:
                name = f"{kernel} kernel, {pooling}, s_f = {past:g}"
                yield row(name, [gram_accuracy(windows, fold, kernel, pooling, past, args) for fold in folds])


def logistic_regression(windows: Windows, fold: Fold) -> tuple[float, float]:
    """Logistic regression on each channel's mean and standard deviation: its accuracy in per cent, and the seconds."""
    start = time.monotonic()
    values = [signal[:length].numpy() for signal, length in zip(windows.values, windows.lengths, strict=True)]
    features = np.array([np.concatenate([signal.mean(0), signal.std(0)]) for signal in values])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(features[fold.train], labels_of(windows, fold.train))
    right = model.score(features[fold.test], labels_of(windows, fold.test))
    return 100 * float(right), time.monotonic() - start


def gram_accuracy(
    windows: Windows, fold: Fold, kernel: str, pooling: str, past: float, args: argparse.Namespace
) -> tuple[float, float]:
    """An SVM on a Gram matrix: its accuracy in per cent, and the seconds that the matrix took.

    Raises:
        RKMError: an argument of the kernel is outside its range.
    """
    start = time.monotonic()
    sequences = standardized(windows, fold, args.device)
    gram = recurrent_gram(
        sequences, kernel=kernel, sigma_f2=past, ngram=args.ngram, pooling=pooling,
        **parameters(kernel, args.degree, args.scale, sequences, args.ngram),
    )  # fmt: skip
    seconds = time.monotonic() - start
    return accuracy(
        normalised(gram).cpu().numpy(), labels_of(windows, fold.train), labels_of(windows, fold.test)
    ), seconds


def standardized(windows: Windows, fold: Fold, device: str) -> list[Tensor]:
    """The windows of the training part, then those of the test part, ``(time, channels)`` each."""
    rows = np.concatenate([fold.train, fold.test]).tolist()
    mean, deviation = (torch.tensor(values, dtype=torch.float32) for values in (fold.mean, fold.deviation))
    return [((windows.values[i, : windows.lengths[i]] - mean) / deviation).to(device) for i in rows]


if __name__ == "__main__":
    main()
