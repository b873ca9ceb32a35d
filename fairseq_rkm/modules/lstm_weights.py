"""Weights of ``nn.LSTM``, which stacks its gates in another order than RKM and has two biases where that has one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError

LSTM_GATES = ("input", "forget", "candidate", "output")
"""The order in which ``nn.LSTM`` stacks its gates (i, f, g, o)."""
GATES_OF_TORCH = {1: "nn.RNN", 3: "nn.GRU", 4: "nn.LSTM"}
"""Modules of PyTorch by the number of their gates."""


def restack(value: Tensor, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """A weight or bias whose blocks of rows stand for the gates ``given``, with its blocks in another order."""
    blocks = dict(zip(given, value.chunk(len(given)), strict=True))
    return torch.cat([blocks[gate] for gate in wanted])


def is_of_torch(names: Sequence[str]) -> bool:
    """Whether names of tensors are those of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, beyond doubt."""
    return any(name.startswith(("bias_ih_l", "bias_hh_l", "weight_hr_l")) for name in names)


def converted(values: dict[str, Tensor], gates: Sequence[str]) -> dict[str, Tensor]:
    """An ``nn.LSTM``'s tensors by name as an RKM's, with its names and its order of gates.

    A bias of which one half is missing stays as it is, as does what has not four blocks of rows.

    Raises:
        RKMError: an LSTM with projections.
    """
    if any(name.startswith("weight_hr") for name in values):
        raise RKMError("an LSTM with projections (weight_hr_l0) has no RKM counterpart")
    rest, joined = dict(values), {}
    for name in values:
        other = name.replace("bias_ih", "bias_hh")
        if name.startswith("bias_ih") and other in values:
            joined[name.replace("bias_ih", "bias")] = rest.pop(name) + rest.pop(other)
        elif name.startswith("weight"):
            joined[name] = rest.pop(name)
    for name, value in joined.items():
        if value.dim() and value.size(0) % len(LSTM_GATES) == 0:
            joined[name] = restack(value, LSTM_GATES, gates)
    return rest | joined
