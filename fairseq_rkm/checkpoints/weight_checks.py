"""Compare a checkpoint's weights with the model that they are to be loaded into."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError


def check(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse weights that PyTorch would load in silence, and that would give wrong numbers.

    Args:
        model: the model as built.
        weights: the checkpoint's weights, by the model's names. PyTorch itself reports other names.

    Raises:
        RKMError: a weight is NaN or infinite, of another kind of number, or a vector in a scalar's place.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, wanted in {**parameters, **dict(model.named_buffers(remove_duplicate=False))}.items():
        given = weights.get(name)
        if given is None:
            continue
        if not isinstance(given, Tensor):
            raise RKMError(f"the checkpoint's weight {name} is a {type(given).__name__}, not a tensor")
        if _kind(given) != _kind(wanted):
            raise RKMError(f"the checkpoint's weight {name} is of {_name(given)}, the model's of {_name(wanted)}")
        if wanted.dim() == 0 and given.dim() == 1 and given.numel() != 1:
            raise RKMError(f"the checkpoint's weight {name} has {given.numel()} numbers, the model's one")
    for name, given in weights.items():
        check_finite(name, given, infinite=name not in parameters)


def check_finite(name: str, tensor: Any, infinite: bool = False) -> None:
    """Refuse NaN and, unless ``infinite``, infinite numbers.

    Args:
        name: the weight's name, for the message.
        tensor: of any shape; a tensor of integers, or another object, passes.
        infinite: let infinite numbers pass.

    Raises:
        RKMError: the count of the numbers that are refused.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return
    wrong = torch.isnan(tensor) if infinite else ~torch.isfinite(tensor)
    count = int(wrong.sum())
    if count:
        raise RKMError(
            f"the checkpoint's weight {name} has {count} of {tensor.numel()} numbers that are "
            f"{'NaN' if infinite else 'NaN or infinite'}: the training diverged or the file is damaged. "
            "Use an earlier checkpoint"
        )


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "float" if tensor.is_floating_point() else "integer"


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
