"""The carried state of all streams in a checkpoint, and its way back to the processes that have the streams then.

Process r of W has the streams ``r * B`` to ``(r + 1) * B - 1`` of all ``W * B``. Another number of processes with
another batch size has the same streams if the product is the same.
"""

from itertools import accumulate
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules import RKMState
from fairseq_rkm.modules.state import state_tensors


def flatten(states: list[RKMState]) -> Tensor:
    """Return the state as one vector, of the widest dtype within it, which holds the others exactly."""
    return torch.cat([tensor.flatten().to(states[0].cell.dtype) for tensor in state_tensors(states)])


def gather(states: list[RKMState]) -> list[Tensor]:
    """Return the state of each process's streams as one vector. All processes have to call this."""
    flat = flatten(states)
    world = distributed_utils.get_data_parallel_world_size()
    if world == 1:
        return [flat]
    gathered = [torch.empty_like(flat) for _ in range(world)]
    torch.distributed.all_gather(gathered, flat, group=distributed_utils.get_data_parallel_group())
    return gathered


def save(states: list[RKMState], ranks: list[Tensor]) -> dict[str, Any]:
    """Return what a checkpoint holds of the state.

    Args:
        states: of this process's streams, one for each layer.
        ranks: from :func:`gather`.

    Returns:
        ``layers``, the number of each layer's ``tensors`` and their ``shapes``, and ``ranks``: for each process its
        state on the CPU.
    """
    return {
        "layers": len(states),
        "tensors": [len(state.tensors()) for state in states],
        "shapes": [list(tensor.shape) for tensor in state_tensors(states)],
        "ranks": [tensor.cpu().clone() for tensor in ranks],
    }


def restore(saved: dict[str, Any], batch_size: int) -> list[RKMState]:
    """Return the state of the streams that are this process's now, one for each layer.

    Args:
        saved: from :func:`save`.
        batch_size: streams of each process now.

    Raises:
        RKMError: the number of all streams is another.
    """
    world = distributed_utils.get_data_parallel_world_size()
    rank = distributed_utils.get_data_parallel_rank() if world > 1 else 0
    shapes = [torch.Size(shape) for shape in saved["shapes"]]
    processes, streams = len(saved["ranks"]), shapes[0][1]
    if processes * streams != world * batch_size:
        raise RKMError(
            f"the checkpoint carries the state of {processes * streams} streams ({processes} processes with "
            f"--batch-size {streams}), and now there are {world * batch_size} ({world} with {batch_size}): give the "
            "same product, or begin an epoch anew with --reset-dataloader"
        )
    parts = [flat.split([shape.numel() for shape in shapes]) for flat in saved["ranks"]]
    # All tensors have the streams in their second dimension.
    whole = [
        torch.cat([part.view(shape) for part in same], dim=1)
        for shape, same in zip(shapes, zip(*parts, strict=True), strict=True)
    ]
    here = [tensor[:, rank * batch_size : (rank + 1) * batch_size].contiguous() for tensor in whole]
    # Before layers could differ in it, a checkpoint did not say how many tensors each has.
    counts = saved.get("tensors") or [len(here) // saved["layers"]] * saved["layers"]
    groups = (here[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True))
    return [RKMState(hidden, cell, context or None) for hidden, cell, *context in groups]
