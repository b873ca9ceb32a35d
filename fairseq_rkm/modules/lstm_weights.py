"""Weights of ``nn.LSTM`` for an RKM: ``nn.LSTM`` stacks its gates in another order and has two biases, RKM one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError

LSTM_GATES = ("input", "forget", "candidate", "output")
"""The order of the gates of ``nn.LSTM`` (i, f, g, o)."""
GATES_OF_TORCH = {1: "nn.RNN", 3: "nn.GRU", 4: "nn.LSTM"}
"""Modules of PyTorch by the number of their gates."""


def restack(value: Tensor, given: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Reorder a weight or bias, one block of rows a gate, from the order ``given`` to the order ``wanted``."""
    blocks = dict(zip(given, value.chunk(len(given)), strict=True))
    return torch.cat([blocks[gate] for gate in wanted])


def is_of_torch(names: Sequence[str]) -> bool:
    """Whether tensors of these names can only be an ``nn.LSTM``'s, ``nn.GRU``'s or ``nn.RNN``'s."""
    return any(name.startswith(("bias_ih_l", "bias_hh_l", "weight_hr_l")) for name in names)


def converted(values: dict[str, Tensor], gates: Sequence[str]) -> dict[str, Tensor]:
    """Convert an ``nn.LSTM``'s tensors to an RKM's names and order of gates.

    A bias without its other half keeps its name. A tensor without four blocks of rows keeps its order.

    Raises:
        RKMError: the LSTM has projections.
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
