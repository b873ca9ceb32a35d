"""Gradients of each sample, as ``opacus`` asks them of a layer for training under differential privacy.

``opacus`` runs an unknown layer once more, under ``torch.func``, from the layer's first positional argument and the
gradient of the layer's first result. An RKM takes a state and masks beside its input, and its final state may be
trained through, too. So each call of an RKM that ``opacus`` has prepared keeps its arguments, and notes the gradients
of all its results. At the end of the backward pass it runs again with them, sample by sample. Nothing of ``opacus`` is
imported here.
"""

import copy
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairseq_rkm.errors import RKMError

SLOT = "ft_compute_sample_grad"
"""The attribute of a prepared layer in which ``opacus`` keeps the function that runs the layer again."""
CALLS = "_calls_in_order"
"""The attribute with the calls that wait for their backward pass, the last first out, as ``opacus`` has it."""


class Call:
    """One call of a layer: its arguments, and the gradients of its results as they come in.

    Args:
        layer: the RKM.
        owner: the ``GradSampleModule`` around it.
        x: the input, as given.
        state: the tensors of the given state, ``(.., B, ..)`` each, or None.
        masks: masks by their argument's name, ``(B, T)`` each.
        final: the final state.
    """

    def __init__(
        self, layer: Any, owner: Any, x: Tensor, state: list[Tensor] | None, masks: dict[str, Tensor], final: Any
    ) -> None:
        self.layer, self.owner = layer, owner
        self.x, self.masks = x.detach(), masks
        self.state = None if state is None else [tensor.detach() for tensor in state]
        self.state_type = type(final)
        self.batch_dim = 0 if layer.batch_first else 1
        device = x.device.type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.noted: dict[str, Tensor] = {}

    def watch(self, result: str, tensor: Tensor) -> Tensor:
        """Have the gradient of a result noted: ``"output"``, or the number of a tensor of the final state."""
        if tensor.requires_grad:
            tensor.register_hook(partial(self._note, result))
        return tensor

    def _note(self, result: str, gradient: Tensor) -> None:
        if not self.owner.hooks_enabled:
            return
        if not self.noted:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.noted[result] = gradient

    def _finish(self) -> None:
        """At the end of the backward pass, put the gradients of each sample where ``opacus`` looks for them."""
        owner, noted, self.noted = self.owner, self.noted, {}
        size = self.x.size(self.batch_dim)
        if "output" not in noted:  # opacus waits for it
            zeros = (self.x.new_zeros(size, size),)
            owner.capture_backprops_hook(self.layer, None, zeros, owner.loss_reduction, owner.batch_first)
        scale = size if owner.loss_reduction == "mean" else 1
        for name, gradient in self.gradients({result: scale * g for result, g in noted.items()}).items():
            parameter = self.layer.get_parameter(name)
            if parameter.requires_grad:
                so_far = getattr(parameter, "_current_grad_sample", None)
                so_far = parameter.grad_sample if so_far is None else so_far
                so_far = so_far[-1] if isinstance(so_far, list) else so_far
                so_far[:size] += gradient

    def gradients(self, noted: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters' gradients, ``(B, ...)`` each, from the results'.

        Each sample runs alone, by the fast backends: ``vmap`` runs by the reference, which takes longer.
        """
        layer, count = _without_hooks(self.layer), self.x.size(self.batch_dim)
        parameters = {name: p.detach().requires_grad_() for name, p in layer.named_parameters()}
        device = self.x.device.type
        with nullcontext() if self.autocast is None else torch.autocast(device, self.autocast), torch.enable_grad():
            samples = [self._gradients_of(layer, parameters, row, noted) for row in range(count)]
        if not samples:  # a batch drawn at random may be empty
            return {name: p.new_zeros(0, *p.shape) for name, p in parameters.items()}
        return dict(zip(parameters, map(torch.stack, zip(*samples, strict=True)), strict=True))

    def _gradients_of(
        self, layer: nn.Module, parameters: dict[str, Any], row: int, noted: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The parameters' gradients by one sample."""
        state = None
        if self.state is not None:
            hidden, memory, *context = [tensor.narrow(1, row, 1) for tensor in self.state]
            state = self.state_type(hidden, memory, context or None)
        options = {"state": state, **{name: mask.narrow(0, row, 1) for name, mask in self.masks.items()}}
        output, final = functional_call(layer, parameters, (self.x.narrow(self.batch_dim, row, 1),), options)
        results = {str(number): (tensor, 1) for number, tensor in enumerate(final.tensors())}
        results["output"] = output, self.batch_dim
        pairs = [(results[name][0], g.narrow(results[name][1], row, 1)) for name, g in noted.items()]
        pairs = [(value, g) for value, g in pairs if value.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(p) for p in parameters.values())
        values, gradients = zip(*pairs, strict=True)
        wanted = list(parameters.values())
        return torch.autograd.grad(values, wanted, gradients, allow_unused=True, materialize_grads=True)


def watch(layer: nn.Module, x: Tensor, state: Any, masks: dict[str, Tensor | None], results: tuple[Any, ...]) -> Any:
    """Have gradients of each sample computed in the backward pass, if ``opacus`` asks for them.

    Args:
        layer: an RKM that ``opacus`` has prepared.
        x: the call's input.
        state: the state given, a pair with or without a context, or None.
        masks: other arguments, ``(B, T)`` each, by name.
        results: the call's output and final state; or three, memories among them, which are refused.

    Returns:
        The results to give out.

    Raises:
        RKMError: gradients of each sample cannot be computed: dropout would draw other masks, another dimension is the
            batch's, or the input is no batch.
    """
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_hooks.values()]
    owner: Any = next((o for o in owners if hasattr(o, "capture_backprops_hook")), None)
    if owner is None or not owner.hooks_enabled or not layer.training or not torch.is_grad_enabled():
        return results
    _check(layer, owner, x)
    if len(results) > 2:
        # Its hook fails where a gradient comes through a second tensor alone.
        raise RKMError("opacus takes no gradients through an RKM's memories: train without return_memory")
    output, final = results
    given = None if state is None else [state[0], state[1], *(getattr(state, "context", None) or [])]
    present = {name: mask for name, mask in masks.items() if mask is not None}
    call = Call(layer, owner, x, given, present, final)
    if hasattr(owner, "max_grad_norm"):
        layer.__dict__.setdefault(CALLS, []).append(call)
        layer.__dict__[SLOT] = partial(_at_once, layer)
        return output, final.map(_refuse)
    layer.__dict__[SLOT] = _later
    numbers = iter(range(len(final.tensors())))
    final = final.map(lambda tensor: call.watch(str(next(numbers)), tensor))
    return call.watch("output", output), final


def _later(parameters: list[Tensor], _inputs: Tensor, backprops: Tensor) -> list[Tensor]:
    """For ``opacus``: zeros, ``(B, ...)`` for each parameter, to which the call adds at the backward pass's end."""
    return [p.new_zeros(backprops.size(0), *p.shape) for p in parameters]


def _at_once(layer: Any, _parameters: Any, _inputs: Tensor, backprops: Tensor) -> list[Tensor]:
    """For ``opacus``' fast gradient clipping, which takes norms at once: what comes through the last call's output."""
    call = layer.__dict__[CALLS].pop()
    return list(call.gradients({"output": backprops.movedim(0, call.batch_dim)}).values())


def _refuse(tensor: Tensor) -> Tensor:
    def refuse(_gradient: Tensor) -> None:
        raise RKMError(
            "opacus' fast gradient clipping sees an RKM's output alone, and the loss reads its final state, too: "
            "take the last step of the output, or grad_sample_mode='hooks'"
        )

    if tensor.requires_grad:
        tensor.register_hook(refuse)
    return tensor


def _check(layer: Any, owner: Any, x: Any) -> None:
    if not torch.is_tensor(x) or x.dim() != 3:
        raise RKMError("for gradients of each sample the input must be a batch, one tensor of three dimensions")
    if owner.batch_first != layer.batch_first:
        raise RKMError(
            f"GradSampleModule takes {_order(owner.batch_first)}, and this RKM {_order(layer.batch_first)}: make the "
            f"RKM with batch_first={owner.batch_first}"
        )
    if layer.dropout.p or layer.weight_dropout or layer.state_dropout:
        raise RKMError(
            "for gradients of each sample a layer runs again, and its dropout draws other masks: make the RKM with "
            "dropout=0, weight_dropout=0 and state_dropout=0, and put fairseq_rkm.modules.LockedDropout between RKMs "
            "of one layer"
        )


def _order(batch_first: bool) -> str:
    return "batches first (batch_first=True)" if batch_first else "time first (batch_first=False)"


def _without_hooks(layer: nn.Module) -> nn.Module:
    """The same layer, which calls no hooks of ``opacus``; pruning and normalisations stay."""
    twin = copy.copy(layer)
    twin.__dict__.pop(SLOT, None)
    twin._parameters = OrderedDict(layer._parameters)
    for hooks in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[hooks] = OrderedDict()
    return twin
