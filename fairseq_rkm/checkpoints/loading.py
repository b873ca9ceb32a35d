"""Facts about the checkpoint that is being loaded: its weights, and the kind of model that it has to be."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """The only kind of model and of task that may be built.

    Attributes:
        model: a class; its subclasses are allowed, too.
        tasks: classes, in the same way.
        use: a verb for the sentence that refuses another model: "translate".
    """

    model: type
    tasks: tuple[type, ...]
    use: str


@dataclass
class Loading:
    """The wanted kind, if any, and the weights of the checkpoint that was read last, by name."""

    wanted: Wanted | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)


LOADING: ContextVar[Loading | None] = ContextVar("LOADING", default=None)


@contextlib.contextmanager
def only(wanted: Wanted) -> Iterator[None]:
    """Within the block, refuse checkpoints of other models and tasks before anything is built.

    >>> with only(Wanted(RKMModel, (TranslationTask,), "translate")):
    ...     hub = RKMModel.from_pretrained(folder)
    """
    token = LOADING.set(Loading(wanted))
    try:
        yield
    finally:
        LOADING.reset(token)
