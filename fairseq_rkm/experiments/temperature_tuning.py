"""Choose a softmax's temperature on the validation set; one pass tries all of them.

    python examples/language_model/tune_temperature.py DATA RUN/checkpoint_best.pt

prints the best temperatures, and the flags to evaluate the test set with. With the flags of a cache, it chooses the
temperature that is best beside that cache.
"""

import argparse

import torch
from torch import Tensor

from fairseq_rkm.experiments.evaluation_tuning import Scored, StreamCache, Tuning, tune

TEMPERATURES = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 1.0, 1.03, 1.05, 1.07, 1.1, 1.15, 1.2, 1.3)


class TemperatureTuning(Tuning):
    """Temperatures, alone or beside a cache."""

    program = "tune_temperature"
    columns = ("temperature",)
    candidates = tuple((value,) for value in TEMPERATURES)

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Add the flags of a cache."""
        parser.add_argument("--cache-size", type=int, default=0, help="outputs that a cache holds; 0: no cache")
        parser.add_argument("--cache-theta", type=float, default=1.0, help="as in fairseq-eval-lm")
        parser.add_argument("--cache-lambda", type=float, default=0.1, help="as in fairseq-eval-lm")

    def __init__(self, args: argparse.Namespace) -> None:
        self.numbers = args.cache_theta, args.cache_lambda
        self.cache = StreamCache(args.cache_size, *self.numbers) if args.cache_size else None

    def score(self, segment: Scored) -> Tensor:
        """As :meth:`Tuning.score`."""
        logits, chosen = segment.logits.float(), segment.of_targets(segment.logits)
        logs = torch.stack([chosen / value - (logits / value).logsumexp(-1).double() for value in TEMPERATURES])
        if self.cache is not None:
            theta, weight = self.numbers
            (logs,) = self.cache.recall(segment).mixed(logs.exp(), theta, [weight])
        return logs.flatten(1).sum(1)

    def flags(self, numbers: tuple[float, ...]) -> str:
        """As :meth:`Tuning.flags`."""
        beside = f" {self.cache.flags(*self.numbers)}" if self.cache else ""
        return f"--softmax-temperature {numbers[0]}{beside}"


def main() -> None:
    """Command line."""
    tune(TemperatureTuning, __doc__)


if __name__ == "__main__":
    main()
