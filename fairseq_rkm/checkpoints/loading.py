"""What is known, while a model is loaded, of the checkpoint that it is loaded from, and of what it has to be."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """The only kind of model and of task that is to be built.

    Attributes:
        model: a class; models of its subclasses are of it.
        tasks: classes likewise.
        use: of such models, for the sentence that refuses another: "translate".
    """

    model: type
    tasks: tuple[type, ...]
    use: str


@dataclass
class Loading:
    """What is wanted, if anything is, and the weights of the checkpoint that was read last."""

    wanted: Wanted | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)


LOADING: ContextVar[Loading | None] = ContextVar("LOADING", default=None)


@contextlib.contextmanager
def only(wanted: Wanted) -> Iterator[None]:
    """Refuse within the block, before anything is built, checkpoints of other models and tasks."""
    token = LOADING.set(Loading(wanted))
    try:
        yield
    finally:
        LOADING.reset(token)
