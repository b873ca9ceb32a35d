"""Dictionaries and weights know the file that they were read from, so that messages can name it."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.data import Dictionary

from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    Dictionary,
    "load",
    why="a dictionary does not know its file, so that a mistake in it cannot be located",
    until="fairseq's dictionaries keep the name of their file",
)
def keep_dictionary_name(load: Callable) -> Callable:
    """Make ``Dictionary.load`` keep the file's name as ``read_from``."""

    def loaded(cls: type, f: Any, add_special_symbols: bool = True) -> Dictionary:
        dictionary: Any = load(cls, f, add_special_symbols)
        if isinstance(f, str):
            dictionary.read_from = f
        return dictionary

    return loaded


@patch(
    checkpoint_utils,
    "load_checkpoint_to_cpu",
    why="a model that takes weights in does not know the checkpoint's name",
    until="fairseq hands the checkpoint's name on",
)
def keep_checkpoint_name(load: Callable) -> Callable:
    """Make ``load_checkpoint_to_cpu`` keep the file's name as ``read_from`` of the weights."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        state = load(path, *args, **kwargs)
        weights = state.get("model") if isinstance(state, dict) else None
        if isinstance(weights, OrderedDict):
            weights.read_from = path  # type: ignore[attr-defined]
        return state

    return load_checkpoint_to_cpu
