"""Choose a continuous cache's theta and lambda on the validation set; one pass tries all pairs.

    python examples/language_model/tune_cache.py DATA RUN/checkpoint_best.pt --size 500

prints the best pairs, and the flags to evaluate the test set with.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fairseq_rkm
from fairseq_rkm.experiments.scored_stream import open_stream
from fairseq_rkm.modules.continuous_cache import CacheMemory, ContinuousCache, cache_probabilities

THETAS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
LAMBDAS = (0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)


def perplexities(decoder: Any, segments: Any, size: int, device: torch.device) -> dict[tuple[float, float], float]:
    """The perplexity of one stream, given as segments, for each pair of theta and lambda."""
    cache, memory = ContinuousCache(size, 1.0, 0.0), None
    grid = list(itertools.product(THETAS, LAMBDAS))
    total, count = torch.zeros(len(grid), dtype=torch.float64, device=device), 0
    for i in range(len(segments)):
        tokens = segments[i]["net_input"]["src_tokens"].to(device)
        target = segments[i]["target"].to(device)
        logits, extra = decoder(tokens, segment=i)
        logs, memory = _mixtures(cache, memory, logits, extra["features"].transpose(0, 1), tokens, target)
        total -= logs
        count += target.numel()
        print(f"\r  {100 * (i + 1) // len(segments)}%", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {pair: math.exp(value / count) for pair, value in zip(grid, total.tolist(), strict=True)}


def _mixtures(
    cache: ContinuousCache, memory: CacheMemory | None, logits: Tensor, outputs: Tensor, tokens: Tensor, target: Tensor
) -> tuple[Tensor, CacheMemory]:
    """A segment's log probability for each pair, ``(pairs,)`` float64, and the memory for the next segment."""
    likeness, words, left = cache.recall(outputs, tokens, memory)
    model = logits.float().softmax(-1).gather(2, target.unsqueeze(-1)).squeeze(-1).double()
    same = words.unsqueeze(1) == target.unsqueeze(-1)
    reached = likeness.isfinite().any(-1)
    logs = []
    for theta in THETAS:
        found = (cache_probabilities(likeness, theta) * same).sum(-1).double()
        logs += [torch.lerp(model, found, weight * reached.double()).log().sum() for weight in LAMBDAS]
    return torch.stack(logs), left


def main() -> None:
    """Command line."""
    try:
        tune()
    except fairseq_rkm.RKMError as error:
        sys.exit(f"tune_cache: {error}")


@torch.no_grad()
def tune() -> None:
    """Score the grid on a split, and print its best pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="binarized data")
    parser.add_argument("checkpoint", type=Path, help="a trained rkm_lm")
    parser.add_argument("--size", type=int, default=500, help="outputs that the cache holds")
    parser.add_argument("--split", default="valid", help="what to choose them on")
    args = parser.parse_args()
    decoder, segments, device = open_stream(args.data, args.checkpoint, args.split)
    found = perplexities(decoder, segments, args.size, device)
    print("theta  lambda  perplexity")
    for (theta, weight), value in sorted(found.items(), key=lambda item: item[1])[:5]:
        print(f"{theta:5}  {weight:6}  {value:10.2f}")
    theta, weight = min(found, key=lambda pair: found[pair])
    print(f"--cache-size {args.size} --cache-theta {theta} --cache-lambda {weight}")


if __name__ == "__main__":
    main()
