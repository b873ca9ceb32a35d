"""The parts of a recipe for language models that a table tries: names for changes of a configuration.

A row of a table is a sum of parts, ``shuffle+past_decode=0.01``. A part is a name of :data:`PARTS`, with a value or
without, or a configuration's key with a value, ``model.dropout=0.5``. ``none`` is the recipe as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from fairseq_rkm.errors import RKMError

NONE = "none"


class Part(NamedTuple):
    """What a name stands for: changes, in which ``{}`` is the value; and the value where none is given."""

    changes: tuple[str, ...]
    value: str = "true"


PARTS = {
    "past_decode": Part(("criterion.past_decode={}",), "0.001"),
    "shuffle": Part(("task.partial_shuffle={}",)),
    # Passes end segments of one length at even places. An epoch is seven of them: it is validated at its end.
    "overlap": Part(
        (
            "task.overlap={}", "task.variable_bptt=false", "task.no_lr_rescaling=false", "dataset.validate_interval=1",
            "checkpoint.save_interval=1",
        ),
        "7",
    ),
    "skip": Part(("model.skip_connections={}",)),
    "state_dropout": Part(("model.dropout_state={}",), "0.2"),
}  # fmt: skip
"""The regularisers of docs/language_models.md, with values to begin with."""

LENGTHS = {
    "optimization": ("max_update", "max_epoch"),
    "lr_scheduler": ("warmup_updates", "force_anneal"),
}
"""The keys that tell how long a recipe trains."""


def changes_of(row: str) -> list[str]:
    """Return the changes of a configuration that a row stands for, as fairseq-hydra-train takes them.

    >>> changes_of("shuffle+past_decode=0.01+model.dropout=0.5")
    ['++task.partial_shuffle=true', '++criterion.past_decode=0.01', '++model.dropout=0.5']

    Args:
        row: parts, joined by ``+``.

    Raises:
        RKMError: a part is neither a name nor a key with a value.
    """
    changes: list[str] = []
    for part in row.split("+"):
        name, given, value = part.partition("=")
        if name == NONE and not given:
            continue
        if name in PARTS and (value or not given):
            found = PARTS[name]
            changes += [f"++{change.format(value or found.value)}" for change in found.changes]
        elif "." in name and value:
            changes.append(f"++{part}")
        else:
            raise RKMError(
                f"unknown part {part!r}: there are {', '.join([NONE, *PARTS])}, each perhaps with a value "
                "(past_decode=0.01), and keys of the configuration with a value (model.dropout=0.5)"
            )
    return changes


def name_of(row: str) -> str:
    """Return a row's name for folders: empty for the recipe as it is.

    >>> name_of("shuffle+past_decode=0.01"), name_of("none")
    ('shuffle+past_decode_0.01', '')
    """
    return "" if row == NONE else row.replace("=", "_").replace("/", "_")


def shortened(config: Path, share: float) -> list[str]:
    """Return the changes that make a configuration's recipe train for a share of its length.

    Args:
        config: its YAML file.
        share: above 0.
    """
    cfg: Any = OmegaConf.load(config)
    return [
        f"++{section}.{key}={max(1, round(share * cfg[section][key]))}"
        for section, keys in LENGTHS.items()
        for key in keys
        if share != 1 and key in cfg.get(section, {})
    ]


def ranking(results: Sequence[tuple[str, float]]) -> str:
    """Return lines of rows, the best first.

    Args:
        results: names of rows and their perplexities on the validation set; several of one name are its seeds.
    """
    means = {name: [value for other, value in results if other == name] for name, _ in results}
    lines = sorted((sum(values) / len(values), name, len(values)) for name, values in means.items())
    return "\n".join(
        f"{value:10.2f}  {name}" + (f"  (mean of {count} seeds)" if count > 1 else "") for value, name, count in lines
    )
