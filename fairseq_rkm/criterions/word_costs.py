"""The cross entropy of words, from logits.

A vocabulary's tensors, ``(N, V)``, are bound by memory. PyTorch writes log probabilities in float32, reads and writes
as many for the gradient of a word's, and reads both again. On a GPU Triton's kernels (``word_cost_kernels.py``) read
logits as they are, once for the costs and once for the gradient.
"""

import functools
import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fairseq_rkm.triton_presence import INTERPRETED, has_triton

logger = logging.getLogger(__name__)

DTYPES = torch.float32, torch.bfloat16, torch.float16
"""The logits that kernels take; others go through PyTorch."""
WORDS_AT_ONCE, ROW_WARPS = 4096, 8
"""The columns that a program takes at a time, and its warps."""


def word_costs(
    logits: Tensor, words: Tensor, ignored: int = -100, reduction: str = "none", predict: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the cross entropy of each row's word, in nats, and the distribution that the logits stand for.

    Both have gradients, once.

    Args:
        logits: ``(N, V)``.
        words: ``(N,)`` int64.
        ignored: a word that costs 0.
        reduction: ``"none"``, or ``"sum"``.
        predict: return probabilities.

    Returns:
        Costs, ``(N,)`` of at least float32, or their sum, ``()``. Probabilities, ``(N, V)``, or None: from a kernel
        they are of the logits' dtype, else of the costs'.
    """
    if _are_taken(logits):
        costs, probabilities = _WordCosts.apply(logits.contiguous(), words.contiguous(), ignored, predict)
        return costs.sum() if reduction == "sum" else costs, probabilities
    log_probs = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    costs = F.nll_loss(log_probs, words, ignore_index=ignored, reduction=reduction)
    return costs, log_probs.exp() if predict else None


class _WordCosts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, words: Tensor, ignored: int, predict: bool
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        costs, sums = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        probabilities = torch.empty_like(logits) if predict else None
        _launch("forward", logits, words, costs, sums, probabilities, given=(ignored,), PREDICT=predict)
        ctx.save_for_backward(logits, words, sums)
        ctx.ignored = ignored
        ctx.set_materialize_grads(False)
        return costs, probabilities

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_costs: Tensor | None, grad_probabilities: Tensor | None
    ) -> tuple[Tensor, None, None, None]:  # fmt: skip
        logits, words, sums = ctx.saved_tensors
        grads = [None if grad is None else grad.contiguous() for grad in (grad_costs, grad_probabilities)]
        grad_logits = torch.empty_like(logits)
        _launch(
            "backward", logits, words, sums, *grads, grad_logits, given=(ctx.ignored,),
            COSTS=grad_costs is not None, PREDICT=grad_probabilities is not None,
        )  # fmt: skip
        return grad_logits, None, None, None


def _launch(name: str, logits: Tensor, *tensors: Tensor | None, given: tuple[int, ...], **flags: bool) -> None:
    """Launch a kernel over the rows; any tensor stands for None, as the kernel is compiled not to use it."""
    from fairseq_rkm.criterions import word_cost_kernels

    rows, width = logits.shape
    block = min(WORDS_AT_ONCE, 1 << (width - 1).bit_length())
    others = [logits if tensor is None else tensor for tensor in tensors]
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        getattr(word_cost_kernels, name)[(rows,)](
            logits, *others, width, *given, **flags, BLOCK=block, num_warps=ROW_WARPS
        )  # fmt: skip


def _are_taken(logits: Tensor) -> bool:
    """Whether kernels take these logits."""
    here = logits.is_cuda or INTERPRETED
    return here and logits.dtype in DTYPES and logits.numel() > 0 and _compiles(logits.device, logits.dtype)


@functools.cache
def _compiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton compiles for a device and logits of a dtype; where it is there and fails, say so once."""
    if not has_triton():
        return False
    try:
        logits = torch.zeros(1, 1, device=device, dtype=dtype)
        _WordCosts.apply(logits, logits[0].long(), -100, False)
    except Exception as error:  # noqa: BLE001  whatever compilers, drivers and their versions raise
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        logger.warning(f"Triton cannot compile here ({reason[0]}): the cross entropy goes through PyTorch, slower")
        return False
    return True
