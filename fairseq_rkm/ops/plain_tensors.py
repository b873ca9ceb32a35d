"""Whether hand-written passes and kernels may run: only on plain tensors, and while nothing follows operators.

C and GPU kernels read memory. Fake, functional, sparse, quantised and batched tensors have none, or another layout.
A tool that follows operators does not see a kernel's work, and would take its results for constants.
``make_fx``, FakeTensorMode, selective checkpoints and counters of operations take an operator of this package
(:mod:`fairseq_rkm.ops.operators`) as one of PyTorch's; so do fake and meta tensors. ``torch.func``, forward-mode
differentiation, ``torch.jit.trace`` and the ONNX exporters follow PyTorch's own operators alone.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

ORDINARY = Tensor, torch.nn.Parameter
"""Classes that leave the meaning of operators to PyTorch."""
TRACED = FakeTensor, FunctionalTensor
"""Classes of tensors without memory that ``torch.compile`` and other tracers hand to operators."""


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether kernels may run here and now, and on these tensors; quick: each call asks it."""
    if is_followed():
        return False
    try:
        for tensor in tensors:
            if tensor is None or (
                type(tensor) in ORDINARY and tensor.data_ptr() and not (tensor.is_neg() or tensor.is_meta)
            ):
                continue
            if not _is_plain(tensor):
                return False
    except RuntimeError:  # one has no storage
        return all(tensor is None or _is_plain(tensor) for tensor in tensors)
    return True


def is_followed() -> bool:
    """Whether a tool follows PyTorch's operators now, and would not see a kernel's work."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_ready(tensor: Any, shape: tuple[int, ...] | None, kind: torch.dtype, place: int) -> bool:
    """Whether a kernel may read a tensor as it lies: plain, contiguous, not empty, and as given.

    Raises:
        RuntimeError: it has no storage.
    """
    return (
        type(tensor) in ORDINARY
        and tensor.dtype is kind
        and tensor.shape == shape
        and tensor.get_device() == place
        and tensor.is_contiguous()
        and tensor.data_ptr() != 0
        and not tensor.is_neg()
    )


def obstacle(*tensors: Tensor | None) -> str | None:
    """The reason, as a sentence's end, why only PyTorch's own operators may take these tensors; None if ours may."""
    reason = _follower()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None or isinstance(tensor, TRACED) or _is_ordinary(tensor):
            continue
        kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
        return f"it takes tensors that lie in memory as they are, and one is a {kind}"
    return None


def _follower() -> str | None:
    """A sentence on the tool that follows PyTorch's own operators now; None if there is none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (grad, vmap, jvp, ...) transforms PyTorch's own operators alone"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace and torch.onnx.export record PyTorch's own operators alone"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through PyTorch's own operators alone"
    return None


def _is_plain(tensor: Tensor) -> bool:
    return not tensor.is_meta and _is_ordinary(tensor)


def _is_ordinary(tensor: Tensor) -> bool:
    return not isinstance(tensor, TRACED) and _keys(tensor) in _ordinary_keys(tensor.device)


def _keys(tensor: Tensor) -> int:
    """The keys that PyTorch dispatches on: layout, device, wrappers and views."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


@functools.cache
def _ordinary_keys(device: torch.device) -> frozenset[int]:
    """The keys of a device's ordinary tensors, made in or out of inference mode."""
    keys = []
    with _disable_current_modes():  # or FakeTensorMode would make these
        for inference in (False, True):
            with torch.inference_mode(inference):
                keys.append(_keys(torch.empty(0, device=device)))
    return frozenset(keys)
