"""The gradients of a model as parts of a few large tensors, each of which processes average in one call."""

from collections.abc import Iterable
from typing import Any, Optional

import torch
import torch.distributed as dist
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn

MOST_AT_ONCE = 1 << 28
"""The most elements that processes average in one call."""
ALIGNMENT = 64
"""A gradient begins at a multiple of so many elements of its bucket, where kernels read it fastest."""


class GradientBuckets:
    """One flat tensor for each device and dtype of some weights, with a place in it for each weight's gradient.

    Gradients that were written to their places are averaged where they are. Others are copied there, in one launch for
    all, and are the weights' gradients from then on.

    Args:
        weights: all weights that receive gradients.
        largest: the most elements that are averaged in one call.

    Attributes:
        places: for each weight a part of a bucket, of the weight's shape.
    """

    def __init__(self, weights: Iterable[Tensor], largest: int = MOST_AT_ONCE) -> None:
        self.weights, self.largest = list(weights), largest
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, weight in enumerate(self.weights):
            kinds.setdefault((weight.device, weight.dtype), []).append(i)
        places: dict[int, Tensor] = {}
        self.buckets: list[Tensor] = []
        for (device, dtype), members in kinds.items():
            sizes = [-(-self.weights[i].numel() // ALIGNMENT) * ALIGNMENT for i in members]
            # The gaps between places are averaged, too, and stay zero.
            self.buckets.append(torch.zeros(sum(sizes), device=device, dtype=dtype))
            for i, part in zip(members, self.buckets[-1].split(sizes), strict=True):
                places[i] = part[: self.weights[i].numel()].view(self.weights[i].shape)
        self.places = [places[i] for i in range(len(self.weights))]

    def average(self, group: Any) -> None:
        """Make each weight's gradient the average over the processes of a group, all of which have to call this.

        A weight without a gradient counts as one with a gradient of zeros.
        """
        self._collect()
        for bucket in self.buckets:
            for part in bucket.split(self.largest):
                average(part, group)

    @torch.no_grad()
    def _collect(self) -> None:
        """Bring all gradients to their places."""
        absent, targets, sources = [], [], []
        for weight, place in zip(self.weights, self.places, strict=True):
            if weight.grad is None:
                absent.append(place)
            elif weight.grad is not place:
                targets.append(place)
                sources.append(weight.grad)
            weight.grad = place
        if absent:
            torch._foreach_zero_(absent)
        if targets:
            torch._foreach_copy_(targets, sources)


def average(tensor: Tensor, group: Any) -> None:
    """Average a tensor in place over the processes of a group."""
    if dist.get_backend(group) == "nccl":
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG, group=group)
        return
    # The sum of halves may be too large where the average is not.
    tensor.div_(distributed_utils.get_world_size(group))
    dist.all_reduce(tensor, group=group)


def buckets_of(model: nn.Module) -> Optional[GradientBuckets]:
    """Return the buckets of fairseq's wrapper for ``--ddp-backend legacy_ddp``, which are made at the first call.

    They are made anew when other weights are trained.

    Args:
        model: a model, in any number of wrappers.

    Returns:
        None if there is no such wrapper.
    """
    wrapper: Any = model
    while not isinstance(wrapper, LegacyDistributedDataParallel):
        wrapper = wrapper._modules.get("module")
        if wrapper is None:
            return None
    # Experts are different weights in each process.
    weights = [p for p in wrapper.module.parameters() if p.requires_grad and not hasattr(p, "expert")]
    known: Optional[GradientBuckets] = wrapper.__dict__.get("gradient_buckets")
    if known is None or [*map(id, known.weights)] != [*map(id, weights)]:
        known = wrapper.gradient_buckets = GradientBuckets(weights)
    return known
