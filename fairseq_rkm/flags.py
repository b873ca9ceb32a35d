"""Describe the flags that an architecture, task, criterion, optimizer or other component adds to fairseq's commands."""

import argparse
import dataclasses
import enum
import shutil
from collections.abc import Iterator
from typing import Any

from fairseq_rkm.errors import RKMError


def describe(name: str) -> str:
    """Return a help text of the flags of all components of a name, fairseq's own components included.

    A preset's name gives the preset's defaults.

    >>> print(describe("nt_asgd").splitlines()[0])
    flags of --optimizer nt_asgd:

    Args:
        name: as ``--arch``, ``--task``, ``--criterion``, ``--optimizer`` and others take it.

    Returns:
        Lines of up to 120 columns.

    Raises:
        RKMError: no component has the name, or fairseq is not installed.
    """
    import fairseq_rkm

    fairseq_rkm.register()
    known = dict(_components())
    found = [kind for kind, names in known.items() if name in names]
    if not found:
        ours = sorted({n for names in known.values() for n, cls in names.items() if _is_ours(cls)})
        raise RKMError(f"fairseq has no component {name!r}; those of fairseq_rkm: {', '.join(ours)}")
    return "\n".join(_flags(kind, name, known[kind][name]) for kind in found)


def _components() -> Iterator[tuple[str, dict[str, type]]]:
    """Yield the flag that chooses a kind of component, and the kind's classes by name."""
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_REGISTRY

    yield "--arch", ARCH_MODEL_REGISTRY
    yield "--task", TASK_REGISTRY
    for name, registry in REGISTRIES.items():
        yield f"--{name.replace('_', '-')}", registry["registry"]


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("fairseq_rkm.")


def _flags(kind: str, name: str, cls: Any) -> str:
    parser = argparse.ArgumentParser(
        prog=f"{kind} {name}", usage=argparse.SUPPRESS, add_help=False, formatter_class=_Formatter
    )
    group = parser.add_argument_group(f"flags of {kind} {name}")
    if hasattr(cls, "add_args"):
        cls.add_args(group)
    defaults = _defaults(kind, name, cls)
    for action in parser._actions:
        value = defaults.get(action.dest)
        action.help = action.help or ""
        if value is not None and value is not False:
            action.help += f" (default: {value})".replace("%", "%%")
    return parser.format_help()


class _Formatter(argparse.HelpFormatter):
    """Format lines as wide as the terminal, up to 120 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns))


def _defaults(kind: str, name: str, cls: Any) -> dict[str, Any]:
    """Return defaults by the flags' names. A preset's defaults come before the configuration's."""
    from fairseq.models import ARCH_CONFIG_REGISTRY

    configuration = getattr(cls, "__dataclass", None)
    values = {}
    for field in dataclasses.fields(configuration) if configuration else ():
        value = field.default
        if value is dataclasses.MISSING or (isinstance(value, str) and ("${" in value or value == "???")):
            continue  # it comes from another part of the configuration, or from the user
        values[field.name] = value.value if isinstance(value, enum.Enum) else value
    preset = argparse.Namespace()
    if kind == "--arch" and name in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[name](preset)
    return values | vars(preset)
