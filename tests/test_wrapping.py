import functools
from types import SimpleNamespace

import pytest

from fairseq_rkm.wrapping import wrap


def doubled(function):
    return lambda *args: 2 * function(*args)


def decorated(function):
    """As fairseq decorates functions of its own."""

    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


class Task:
    def method(self, x):
        """A docstring."""
        return x

    @classmethod
    def class_method(cls, x):
        return [cls.__name__, x]


class Derived(Task):
    pass


@pytest.mark.parametrize("function", [abs, decorated(abs)], ids=["plain", "decorated"])
def test_a_function_is_wrapped_once(function):
    module = SimpleNamespace(function=function)
    for _ in range(2):
        wrap(module, "function", doubled)
        assert module.function(-3) == 6
    assert module.function.__name__ == "abs"
    assert module.function.__wrapped__ is function


def test_methods_are_wrapped_where_they_are_asked_for_alone():
    for _ in range(2):
        wrap(Derived, "method", doubled)
        wrap(Derived, "class_method", doubled)
    assert (Derived().method(3), Task().method(3)) == (6, 3)
    assert (Derived.class_method(1), Task.class_method(1)) == (["Derived", 1] * 2, ["Task", 1])
    assert Derived.method.__doc__ == "A docstring."
