"""Whether hand-written passes and kernels may run: only on plain tensors, and while nothing follows operators.

C and GPU kernels read memory. Fake, functional, sparse, quantised and batched tensors have none, or another layout.
``torch.func``, ``make_fx``, FakeTensorMode, ``torch.jit.trace`` and the ONNX exporters follow PyTorch's single
operators. They do not see a kernel's work, and would take its results for constants.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad

ORDINARY = Tensor, torch.nn.Parameter
"""Classes that leave the meaning of operators to PyTorch."""


def obstacle(*tensors: Tensor | None) -> str | None:
    """The reason, as a sentence's end, why only PyTorch's own operators may take these tensors; None if kernels may."""
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
    """Whether a tensor of an ordinary class with elements is plain; quick: each call asks it of each tensor."""
    try:
        return tensor.data_ptr() != 0 and not tensor.is_neg()
    except RuntimeError:  # the tensor has no storage
        return False


def _follower() -> str | None:
    """A sentence on the tool that follows PyTorch's operators now; None if there is none."""
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
    """The keys that PyTorch dispatches on: layout, device, wrappers and views."""
    keys: int = torch._C._dispatch_keys(tensor).raw_repr()
    return keys


@functools.cache
def _plain_keys(device: torch.device) -> frozenset[int]:
    """The keys of a device's ordinary tensors, made in or out of inference mode."""
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(_keys(torch.empty(0, device=device)))
    return frozenset(keys)
