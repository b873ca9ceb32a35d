"""Check a checkpoint's contents: containers of a bounded size, a configuration of plain values, plain tensors."""

from argparse import Namespace
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch

from fairseq_rkm.checkpoints.classes import plain
from fairseq_rkm.errors import RKMError

MOST_VALUES = 20_000_000
MOST_SETTINGS = 100_000
DEEPEST = 100
MOST_LAYERS = 1000
NUMBERS_AND_TEXT = (type(None), bool, int, float, str, bytes)


def check(state: Any) -> None:
    """Refuse contents that are not a checkpoint of fairseq. Put numpy's arrays in the place of their stand-ins.

    Args:
        state: the checkpoint as read; changed in place.

    Raises:
        RKMError: the reason, without the file's name.
    """
    if not isinstance(state, dict):
        raise RKMError(f"it holds a {type(state).__name__}, where a checkpoint of fairseq holds a dictionary")
    count_values(state, MOST_VALUES)
    _check_model(state)
    if not any(isinstance(state.get(name), (dict, Namespace)) for name in ("cfg", "args")):
        raise RKMError("it is damaged or not a checkpoint of fairseq: it has neither cfg nor args")
    for name in ("cfg", "args"):
        count_values(state.get(name), MOST_SETTINGS)
        _check_settings(state.get(name), name)

    _check_layers(state["cfg"] if state.get("cfg") else state["args"], len(state["model"]))


def _check_layers(settings: Any, weights: int) -> None:
    """Refuse more layers than weights: models make lists of layers before they take memory for them."""
    for key, value in _children(settings):
        if isinstance(value, (dict, Namespace)):
            _check_layers(value, weights)
        elif type(value) is int and str(key).endswith("layers") and value > max(weights, MOST_LAYERS):
            raise RKMError(f"refused: its configuration asks for a model of {value:,} layers, of {weights} weights")


def _check_model(state: dict) -> None:
    model = state.get("model")
    if not isinstance(model, dict) or not model:
        has = "no model" if "model" not in state else f"a model that is {_described(model)}"
        raise RKMError(f"it is damaged or not a checkpoint of fairseq: it has {has}")
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise RKMError(f"its model names a weight {name!r}")
        if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.device.type == "meta"):
            kind = "meta" if tensor.device.type == "meta" else tensor.layout
            raise RKMError(f"its weight {name} is not a plain tensor ({kind})")


def _described(value: Any) -> str:
    return "empty" if isinstance(value, dict) else f"a {type(value).__name__}"


def count_values(value: Any, most: int) -> None:
    """Refuse a container that has too many values when written out, is nested too deep, or contains itself.

    Stand-ins for numpy's arrays are replaced on the way.

    Args:
        value: any value; containers are dicts, lists, tuples, sets and Namespaces.
        most: the most values. A container that stands in several places counts in each.

    Raises:
        RKMError: too many values, more than 100 levels, or a container within itself.
    """
    counts: dict[int, int] = {}
    unfinished: set[int] = set()

    def count(item: Any, depth: int) -> int:
        if isinstance(item, torch.Tensor) or not isinstance(item, (dict, list, tuple, set, Namespace)):
            return 1
        known = counts.get(id(item))
        if known is not None:
            return known
        if id(item) in unfinished or depth > DEEPEST:
            raise RKMError("its containers contain themselves, or are nested more than 100 deep")
        unfinished.add(id(item))
        total = 1
        for key, child in _children(item):
            total += count(child, depth + 1)
            if plain(child) is not child:
                _put(item, key, plain(child))
            if total > most:
                raise RKMError(f"its containers hold, written out, more than {most} values")
        unfinished.discard(id(item))
        counts[id(item)] = total
        return total

    count(value, 0)


def _children(container: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(container, Namespace):
        container = vars(container)
    return iter(list(container.items() if isinstance(container, dict) else enumerate(container)))


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, Namespace):
        setattr(container, key, value)
    elif isinstance(container, (MutableMapping, list)):
        container[key] = value
    else:
        raise RKMError("an array within a tuple")


def _check_settings(value: Any, name: str) -> None:
    """Refuse a value that is not a setting, and text that omegaconf would resolve."""
    if isinstance(value, str) and "${" in value:
        raise RKMError(f"refused: its setting {name} is {value[:60]!r}, and a checkpoint's settings are not resolved")
    if isinstance(value, (dict, list, tuple, set, Namespace)):
        for key, child in _children(value):
            _check_settings(key, f"{name}.{key}"[:80])
            _check_settings(child, f"{name}.{key}"[:80])
    elif not isinstance(value, NUMBERS_AND_TEXT):
        raise RKMError(f"its setting {name} is a {type(value).__name__}, where numbers and text belong")
