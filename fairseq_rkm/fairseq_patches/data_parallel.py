"""Processes that train one model: how their gradients become one, and which ``--ddp-backend`` goes with which flags."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import fairseq.models
import torch
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from torch import nn

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.processes import trains
from fairseq_rkm.fairseq_patches.registry import patch
from fairseq_rkm.optim.gradient_buckets import buckets_of

logger = logging.getLogger(__name__)

NEEDS_FAIRSCALE = ("fully_sharded", "slowmo")
"""Values of ``--ddp-backend`` for which fairseq uses the library fairscale."""


@patch(
    LegacyDistributedDataParallel,
    "all_reduce_grads",
    why="legacy_ddp copies each weight's gradient to a buffer and back, two launches each",
    until="fairseq averages gradients where they are",
)
def average_in_buckets(_one_by_one: Callable) -> Callable:
    """Make ``all_reduce_grads`` average all gradients in as few calls."""

    def all_reduce_grads(wrapper: Any) -> None:
        buckets = None if wrapper.accumulate_grads else buckets_of(wrapper)
        if buckets is not None:
            buckets.average(wrapper.process_group)

    return all_reduce_grads


@patch(
    fairseq.models,
    "DistributedFairseqModel",
    why="pytorch_ddp averages gradients within the backward pass, and --cuda-graphs replays that as one launch",
    until="fairseq records the passes of a model itself",
)
def average_after_replay(wrap: Callable) -> Callable:
    """Make ``DistributedFairseqModel`` take ``legacy_ddp`` for a model with ``--cuda-graphs``, or refuse the flags."""

    def distributed_fairseq_model(args: Any, model: nn.Module, process_group: Any, device: torch.device) -> nn.Module:
        if getattr(model, "cuda_graphs", False):
            take_legacy_ddp(args)
        wrapped: nn.Module = wrap(args, model, process_group, device)
        return wrapped

    return distributed_fairseq_model


def take_legacy_ddp(flags: Any) -> None:
    """Set ``--ddp-backend legacy_ddp``, which averages gradients after the backward pass.

    Args:
        flags: the section ``distributed_training`` of a configuration.

    Raises:
        RKMError: the backend does more than to average gradients.
    """
    backend = str(flags.ddp_backend)
    if backend in ("legacy_ddp", "no_c10d"):
        return
    if backend not in ("pytorch_ddp", "c10d"):
        raise RKMError(f"--cuda-graphs cannot be had with --ddp-backend {backend}: take --ddp-backend legacy_ddp")
    if str(flags.ddp_comm_hook) != "none":
        raise RKMError(
            f"--ddp-comm-hook {flags.ddp_comm_hook} is for gradients that are averaged within the backward pass, which "
            "--cuda-graphs replays: give one or the other"
        )
    logger.info("--cuda-graphs averages gradients after the replay: --ddp-backend legacy_ddp")
    flags.ddp_backend = "legacy_ddp"


@patch(
    distributed_utils,
    "call_main",
    why="without the library fairscale, --ddp-backend fully_sharded and slowmo end in a stack trace of each process",
    until="fairseq says in a sentence which library it lacks",
)
def ask_for_fairscale(call: Callable) -> Callable:
    """Make ``call_main`` refuse what needs a library that is not installed, before processes start."""

    def call_main(cfg: Any, main: Callable, **kwargs: Any) -> None:
        backend = str(cfg.distributed_training.ddp_backend)
        if trains(main) and backend in NEEDS_FAIRSCALE and importlib.util.find_spec("fairscale") is None:
            raise RKMError(without_fairscale(backend))
        if trains(main) and backend == "fully_sharded" and (cfg.common.bf16 or cfg.common.memory_efficient_bf16):
            raise RKMError("--ddp-backend fully_sharded is for float32 and --fp16: with --bf16 take legacy_ddp")
        call(cfg, main, **kwargs)

    return call_main


def without_fairscale(backend: str) -> str:
    """Return the sentence about a backend whose library is not installed."""
    return (
        f"--ddp-backend {backend} needs the library fairscale, which is not installed: pip install fairscale, or take "
        "--ddp-backend legacy_ddp, which trains the same model on as many GPUs"
    )
