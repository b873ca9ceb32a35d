"""How a function of fairseq's is given something to do before or after it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Callable]) -> None:
    """Put ``wrapper(function)`` in a function's place, as which it goes on to be known; a second call changes nothing.

    Args:
        owner: a module or a class.
        name: of a function of the module's, or of the class's own or inherited method or class method.
        wrapper: from what was there, for a class method with the class as its first argument, to what is to be.
    """
    is_class_method = isinstance(inspect.getattr_static(owner, name), classmethod)
    given = getattr(owner, name)
    function = given.__func__ if is_class_method else given
    # Not told by __wrapped__, which functions that fairseq has decorated itself have as well.
    if hasattr(function, "wrapped_by_fairseq_rkm"):
        return
    wrapped: Any = functools.wraps(function)(wrapper(function))
    wrapped.wrapped_by_fairseq_rkm = True
    setattr(owner, name, classmethod(wrapped) if is_class_method else wrapped)
