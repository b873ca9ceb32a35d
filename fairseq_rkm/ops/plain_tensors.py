"""Whether hand-written passes and kernels may be used: on plain tensors, and unseen by anything that follows operators.

C and GPU kernels read memory. A fake, functional, sparse, quantised or batched tensor has none, or has it in another
form. What follows PyTorch's operators one by one (``torch.func``, ``make_fx``, FakeTensorMode, ``torch.jit.trace``, the
ONNX exporters) does not see what a kernel does, and would take what it leaves in memory for a constant.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

ORDINARY = Tensor, torch.nn.Parameter
"""Classes that do not say themselves what operators do to them."""


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why only PyTorch's own operators may take these tensors now, as the end of a sentence; None if all else may."""
    if torch.compiler.is_dynamo_compiling():
        return None  # the compiler reads the program; it does not run it
    reason = _follower()
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor is None or (type(tensor) in ORDINARY and _in_memory(tensor)):
            continue
        if _keys(tensor) not in _plain_keys(tensor.device):
            kind = f"{type(tensor).__name__} of layout {tensor.layout} on {tensor.device}"
            return f"it takes tensors that lie in memory as they are, and one is a {kind}"
    return None


def _in_memory(tensor: Tensor) -> bool:
    """Whether a tensor of an ordinary class that has elements is plain: quick, since each call asks it of each."""
    try:
        return tensor.data_ptr() != 0 and not tensor.is_neg()
    except RuntimeError:  # it has no storage
        return False


def _follower() -> str | None:
    """What follows PyTorch's operators at the moment, in a sentence; None if nothing does."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func (grad, vmap, jvp, ...) transforms PyTorch's own operators alone"
    if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return "a mode (FakeTensorMode, make_fx, a counter of operations, ...) follows PyTorch's own operators alone"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace and torch.onnx.export record PyTorch's own operators alone"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation goes through PyTorch's own operators alone"
    return None


def _keys(tensor: Tensor) -> int:
    """What PyTorch dispatches on: layout and device, and all that wraps a tensor or views it as another."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


@functools.cache
def _plain_keys(device: torch.device) -> frozenset[int]:
    """The keys of a device's ordinary tensors, made in inference mode or not."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(_keys(torch.empty(0, device=device)))
    return frozenset(keys)
