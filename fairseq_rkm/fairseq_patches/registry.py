"""Declare, list, select and make changes to fairseq.

>>> @patch(Trainer, "clip_grad_norm", why="...", until="...")
... def late(clip_grad_norm):
...     def clipped(trainer, clip_norm): ...
...     return clipped
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fairseq_rkm.errors import RKMError

logger = logging.getLogger(__name__)
# fairseq's import leaves the root logger at DEBUG, though nobody asked for it; LOGLEVEL is fairseq's own variable.
logger.setLevel(os.environ.get("LOGLEVEL", "INFO").upper())
Function = TypeVar("Function", bound=Callable)

SWITCH = "FAIRSEQ_RKM_PATCHES"
"""The environment variable that selects patches: names or subjects between commas; ``-`` before one leaves it out."""

PATCHES: "dict[str, Patch]" = {}
"""All declared patches by name, in the order in which they are made."""


@dataclass(frozen=True)
class Patch:
    """A change to fairseq, or to a part of torch or numpy that fairseq needs.

    Attributes:
        subject: the file that declares it.
        name: ``subject.function``, after the function that makes the change.
        target: the changed function or setting.
        why: the fault that it mends.
        until: the condition on which it goes.
        make: makes the change; a second call changes nothing.
    """

    subject: str
    name: str
    target: str
    why: str
    until: str
    make: Callable[[], None]


def patch(owner: Any, attribute: str, *, why: str, until: str) -> Callable[[Function], Function]:
    """Declare that the decorated function turns ``owner.attribute`` into the function that takes its place.

    Args:
        owner: a module or a class.
        attribute: the name of a function of the module, or of a method or class method of the class, own or inherited.
        why: the fault that the change mends, in a sentence.
        until: the condition on which the change goes.
    """

    def declare(wrapper: Function) -> Function:
        name = owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"
        _declare(wrapper, f"{name}.{attribute}", why, until, lambda: wrap(owner, attribute, wrapper))
        return wrapper

    return declare


def setting(target: str, *, why: str, until: str) -> Callable[[Function], Function]:
    """Declare that the decorated function, called without arguments, changes ``target``.

    A second call of the function has to change nothing.

    Args:
        target: the name of the changed function or setting, for the list of patches.
        why: the fault that the change mends, in a sentence.
        until: the condition on which the change goes.
    """

    def declare(make: Function) -> Function:
        _declare(make, target, why, until, make)
        return make

    return declare


def _declare(function: Callable, target: str, why: str, until: str, make: Callable[[], None]) -> None:
    subject = function.__module__.rpartition(".")[2]
    declared = Patch(subject, f"{subject}.{function.__name__}", target, why, until, make)
    known = PATCHES.get(declared.name)
    if known is not None and known.target != target:
        raise ValueError(f"two patches are called {declared.name}")
    PATCHES[declared.name] = declared


def apply(selection: str | None = None) -> None:
    """Make the selected changes. Changes that were made before stay.

    Args:
        selection: in :data:`SWITCH`'s notation; by default the variable's value.

    Raises:
        RKMError: the selection names an unknown patch.
    """
    for declared in selected(os.environ.get(SWITCH, "") if selection is None else selection):
        declared.make()
        logger.debug("%s changes %s: %s", declared.name, declared.target, declared.why)


def selected(selection: str) -> Iterable[Patch]:
    """Return the patches of a selection: the named ones, or all if none is named, less the ones left out.

    Raises:
        RKMError: the selection names an unknown patch.
    """
    named: set[str] = set()
    left_out: set[str] = set()
    for entry in filter(None, (part.strip() for part in selection.split(","))):
        name = entry.removeprefix("-")
        matching = {key for key, declared in PATCHES.items() if name in (key, declared.subject)}
        if not matching:
            raise RKMError(f"{SWITCH}: no patch or subject {name!r}; python -m fairseq_rkm.fairseq_patches lists them")
        (left_out if entry.startswith("-") else named).update(matching)
    return [declared for key, declared in PATCHES.items() if key in (named or PATCHES) and key not in left_out]


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Callable]) -> None:
    """Put ``wrapper(function)`` in a function's place, under the function's name. A second call changes nothing.

    Args:
        owner: a module or a class.
        name: the name of a function of the module, or of a method, class method or static method of the class, own or
            inherited.
        wrapper: takes the function and returns the new one. A class method's function has the class as its first
            argument.
    """
    kind = type(inspect.getattr_static(owner, name))
    given = getattr(owner, name)
    function = given.__func__ if kind is classmethod else given
    made_by = getattr(function, "wrapped_by_fairseq_rkm", ())
    if wrapper in made_by:
        return
    wrapped: Any = functools.wraps(function)(wrapper(function))
    # __wrapped__ does not tell: functions that fairseq itself has decorated have it as well.
    wrapped.wrapped_by_fairseq_rkm = (*made_by, wrapper)
    setattr(owner, name, kind(wrapped) if kind in (classmethod, staticmethod) else wrapped)
