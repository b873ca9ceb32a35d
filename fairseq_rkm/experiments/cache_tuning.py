"""Choose a continuous cache's theta and lambda on the validation set; one pass tries all pairs.

    python examples/language_model/tune_cache.py DATA RUN/checkpoint_best.pt --size 500

prints the best pairs, and the flags to evaluate the test set with.
"""

import argparse
import itertools

import torch
from torch import Tensor

from fairseq_rkm.experiments.evaluation_tuning import Scored, StreamCache, Tuning, tune

THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
LAMBDAS = (0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)


class CacheTuning(Tuning):
    """Pairs of theta and lambda."""

    program = "tune_cache"
    columns = ("theta", "lambda")
    candidates = tuple(itertools.product(THETAS, LAMBDAS))

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add ``--size``."""
        parser.add_argument("--size", type=int, default=500, help="outputs that the cache holds")

    def __init__(self, args: argparse.Namespace) -> None:
        self.cache = StreamCache(args.size)

    def score(self, segment: Scored) -> Tensor:
        """As :meth:`Tuning.score`."""
        recalled = self.cache.recall(segment)
        model = segment.of_targets(segment.logits.float().softmax(-1))
        return torch.stack([logs.sum() for theta in THETAS for logs in recalled.mixed(model, theta, LAMBDAS)])

    def flags(self, numbers: tuple[float, ...]) -> str:
        """As :meth:`Tuning.flags`."""
        return self.cache.flags(*numbers)


def main() -> None:
    """Command line."""
    tune(CacheTuning, __doc__)


if __name__ == "__main__":
    main()
