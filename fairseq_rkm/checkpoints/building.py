"""Bound the memory that a model takes while it is built for a checkpoint, by the checkpoint's weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_rkm.errors import RKMError

LEAST = 1 << 26
"""Elements that any model may take, beside a multiple of its checkpoint's: no checkpoint holds tables of positions."""

MULTIPLE = 16
OPERATIONS_A_WEIGHT = 200
"""Operations that a model may take for each of its checkpoint's weights, beside 10,000."""


class Bounded(TorchDispatchMode):
    """Refuse tensors that are far larger than a checkpoint's weights, before memory is taken for them.

        with Bounded(state["model"]):
            model = task.build_model(cfg.model)

    Args:
        weights: the checkpoint's weights by name. Values that are not tensors count nothing.

    Raises:
        RKMError: within the block, for too many numbers or too many operations.
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        self.held = sum(tensor.numel() for tensor in weights.values() if isinstance(tensor, torch.Tensor))
        self.most = MULTIPLE * self.held + LEAST
        self.most_operations = 10_000 + OPERATIONS_A_WEIGHT * len(weights)
        self.taken = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked, kwargs = _elements(func, args), kwargs or {}
        if _makes_tensors(func):
            self.taken += asked
        self.operations += 1
        if max(asked, self.taken) > self.most or self.operations > self.most_operations:
            raise RKMError(
                f"refused: its configuration asks for a model of {max(asked, self.taken):,} and more numbers, and its "
                f"weights are {self.held:,}"
            )
        return func(*args, **kwargs)


def _makes_tensors(func: Any) -> bool:
    return not any(str(argument.type) == "Tensor" for argument in func._schema.arguments)


def _elements(func: Any, args: Any) -> int:
    """Return the number of elements that an operation makes, as far as its arguments tell."""
    name = func._schema.name
    if name == "aten::eye":
        return math.prod(value for value in args[:2] if isinstance(value, int)) ** (1 if len(args) > 1 else 2)
    if name == "aten::arange":
        numbers = [value for value in args if isinstance(value, (int, float))]
        return int(max(map(abs, numbers), default=0))
    sizes = [value for value in args if isinstance(value, (list, tuple)) and all(type(item) is int for item in value)]
    shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
    if name == "aten::repeat":
        return math.prod(sizes[0]) * args[0].numel()
    if _makes_tensors(func) or name.startswith("aten::new_"):
        return math.prod(sizes[0]) if sizes else 0
    if len(shapes) > 1:
        try:
            return math.prod(torch.broadcast_shapes(*shapes))
        except RuntimeError:
            return 0
    return 0
