"""Choose a softmax's temperature on the validation set; one pass tries all of them.

    python examples/language_model/tune_temperature.py DATA RUN/checkpoint_best.pt

prints the best temperatures, and the flags to evaluate the test set with. With the flags of a cache, it chooses the
temperature that is best beside that cache.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fairseq_rkm
from fairseq_rkm.experiments.scored_stream import open_stream
from fairseq_rkm.modules.continuous_cache import CacheMemory, ContinuousCache, cache_probabilities

TEMPERATURES = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 1.0, 1.03, 1.05, 1.07, 1.1, 1.15, 1.2, 1.3)


def perplexities(
    decoder: Any, segments: Any, cache: ContinuousCache | None, device: torch.device
) -> dict[float, float]:
    """The perplexity of one stream, given as segments, for each temperature."""
    memory: CacheMemory | None = None
    total, count = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=device), 0
    for i in range(len(segments)):
        tokens = segments[i]["net_input"]["src_tokens"].to(device)
        target = segments[i]["target"].to(device)
        logits, extra = decoder(tokens, segment=i)
        logs = _log_probabilities(logits, target)
        if cache is not None:
            likeness, words, memory = cache.recall(extra["features"].transpose(0, 1), tokens, memory)
            logs = _mixed(cache, logs, likeness, words, target)
        total -= logs.flatten(1).sum(1)
        count += target.numel()
        print(f"\r  {100 * (i + 1) // len(segments)}%", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {value: math.exp(sum_ / count) for value, sum_ in zip(TEMPERATURES, total.tolist(), strict=True)}


def _log_probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """The targets' logarithms, ``(temperatures, B, T)`` float64, for logits ``(B, T, V)``."""
    chosen = logits.gather(2, target.unsqueeze(-1)).squeeze(-1).double()
    return torch.stack([chosen / value - (logits.float() / value).logsumexp(-1).double() for value in TEMPERATURES])


def _mixed(cache: ContinuousCache, logs: Tensor, likeness: Tensor, words: Tensor, target: Tensor) -> Tensor:
    """The same logarithms of the mixture with a cache."""
    found = (cache_probabilities(likeness, cache.theta) * (words.unsqueeze(1) == target.unsqueeze(-1))).sum(-1)
    return torch.lerp(logs.exp(), found.double(), cache.weight * likeness.isfinite().any(-1).double()).log()


def main() -> None:
    """Command line."""
    try:
        tune()
    except fairseq_rkm.RKMError as error:
        sys.exit(f"tune_temperature: {error}")


@torch.no_grad()
def tune() -> None:
    """Score the temperatures on a split, and print the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="binarized data")
    parser.add_argument("checkpoint", type=Path, help="a trained rkm_lm")
    parser.add_argument("--split", default="valid", help="what to choose it on")
    parser.add_argument("--cache-size", type=int, default=0, help="outputs that a cache holds; 0: no cache")
    parser.add_argument("--cache-theta", type=float, default=1.0, help="as in fairseq-eval-lm")
    parser.add_argument("--cache-lambda", type=float, default=0.1, help="as in fairseq-eval-lm")
    args = parser.parse_args()
    cache = ContinuousCache(args.cache_size, args.cache_theta, args.cache_lambda) if args.cache_size else None
    decoder, segments, device = open_stream(args.data, args.checkpoint, args.split)
    found = perplexities(decoder, segments, cache, device)
    print("temperature  perplexity")
    for value in sorted(found, key=found.__getitem__)[:5]:
        print(f"{value:11}  {found[value]:10.2f}")
    numbers = (args.cache_size, args.cache_theta, args.cache_lambda)
    beside = " --cache-size {} --cache-theta {} --cache-lambda {}".format(*numbers) if cache else ""
    print(f"--softmax-temperature {min(found, key=found.__getitem__)}{beside}")


if __name__ == "__main__":
    main()
