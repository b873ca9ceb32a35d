"""Weights of ``nn.LSTM`` for an RKM: ``nn.LSTM`` stacks its gates in another order and has two biases, RKM one."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fairseq_rkm.errors import RKMError

LSTM_GATES = ("input", "forget", "candidate", "output")
"""The order of the gates of ``nn.LSTM`` (i, f, g, o)."""
GATES_OF_TORCH = {1: "nn.RNN", 3: "nn.GRU", 4: "nn.LSTM"}
"""Modules of PyTorch by the number of their gates."""
STACKED = ("weight_ih", "weight_hh", "bias")
"""What the names of tensors with one block of rows a gate begin with; ``weight_hr`` has other rows."""


def restack(value: Tensor, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Reorder a weight or bias, one block of rows a gate, from the order ``given`` to the order ``wanted``."""
    blocks = dict(zip(given, value.chunk(len(given)), strict=True))
    return torch.cat([blocks[gate] for gate in wanted])


def is_of_torch(names: Sequence[str]) -> bool:
    """Whether tensors of these names can only be an ``nn.LSTM``'s, ``nn.GRU``'s or ``nn.RNN``'s."""
    return any(_stem(name).startswith(("bias_ih_l", "bias_hh_l")) for name in names)


def may_be_of_torch(names: Sequence[str]) -> bool:
    """Whether all tensors of these names may be such a module's without biases."""
    return bool(names) and all(_stem(name).startswith(("weight_ih_l", "weight_hh_l", "weight_hr_l")) for name in names)


def check_not_reparametrized(names: Sequence[str]) -> None:
    """Refuse an ``nn.LSTM``'s weights whose gates cannot be told apart; pruned ones have whole rows and pass.

    Raises:
        RKMError: a name is of a normalised or parametrized weight.
    """
    for name in names:
        if name.startswith("parametrizations.") or re.fullmatch(r"(weight|bias)_.*_[guv]", name):
            raise RKMError(
                f"the weights are of an nn.LSTM under PyTorch's normalisations or parametrizations ({name}): load them "
                "into the same nn.LSTM and take RKM.from_lstm of it"
            )


def _stem(name: str) -> str:
    return name.removeprefix("parametrizations.")


def converted(values: dict[str, Tensor], gates: Sequence[str]) -> dict[str, Tensor]:
    """Convert an ``nn.LSTM``'s tensors to an RKM's names and order of gates.

    A bias without its other half keeps its name. A tensor without four blocks of rows keeps its order.
    """
    rest, joined = dict(values), {}
    for name in values:
        other = name.replace("bias_ih", "bias_hh")
        if name.startswith("bias_ih") and other in values:
            joined[name.replace("bias_ih", "bias")] = rest.pop(name) + rest.pop(other)
        elif name.startswith(STACKED[:2]):
            joined[name] = rest.pop(name)
    for name, value in joined.items():
        if value.dim() and value.size(0) % len(LSTM_GATES) == 0:
            joined[name] = restack(value, LSTM_GATES, gates)
    return rest | joined


@contextmanager
def effective_weights(module: nn.Module) -> Iterator[None]:
    """Within it, a module's weights have the values of its next call in evaluation, without gradients.

    PyTorch's pruning and old normalisations compute a weight before each call; the attribute is stale after an
    optimizer's step. Its parametrizations compute a weight whenever it is read; in training the spectral one then
    changes its vectors. The module is left as it was.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
                    hook(module, ())
            yield
    finally:
        for part, training in modes:
            part.training = training


def is_trained(module: nn.Module, name: str) -> bool:
    """Whether a weight, or one that PyTorch's pruning, normalisations or parametrizations make it from, is trained."""
    made_from = re.compile(rf"{name}(_orig|_g|_v)*")
    origins = [p for key, p in module.named_parameters(recurse=False) if made_from.fullmatch(key)]
    if torch.nn.utils.parametrize.is_parametrized(module, name):
        origins += module.get_submodule(f"parametrizations.{name}").parameters()
    return any(p.requires_grad for p in origins)


def copy_from_lstm(lstm: nn.LSTM, rkm: nn.Module, gates: Sequence[str]) -> None:
    """Copy the weights of an ``nn.LSTM`` to an RKM of its sizes, and which of them are trained.

    The RKM's bias is the sum of two; it is trained if one of them is.
    """
    with effective_weights(lstm):
        for name, parameter in rkm.named_parameters():
            halves = (
                [name.replace("bias", "bias_ih"), name.replace("bias", "bias_hh")]
                if name.startswith("bias")
                else [name]
            )
            value = torch.stack([getattr(lstm, half) for half in halves]).sum(0)
            parameter.copy_(restack(value, LSTM_GATES, gates) if name.startswith(STACKED) else value)
            parameter.requires_grad_(any(is_trained(lstm, half) for half in halves))


def copy_to_lstm(rkm: nn.Module, lstm: nn.LSTM, gates: Sequence[str]) -> None:
    """Copy the weights of an RKM to an ``nn.LSTM`` of its sizes, and which of them are trained.

    The first of the two biases is the RKM's, the second zero.
    """
    with effective_weights(rkm):
        for name, parameter in lstm.named_parameters():
            own = re.sub("^bias_[ih]h", "bias", name)
            value = getattr(rkm, own)
            value = restack(value, gates, LSTM_GATES) if own.startswith(STACKED) else value
            parameter.copy_(torch.zeros_like(value) if name.startswith("bias_hh") else value)
            parameter.requires_grad_(is_trained(rkm, own))
