import functools
from types import SimpleNamespace

import pytest

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import registry
from fairseq_rkm.fairseq_patches.__main__ import main as print_list
from fairseq_rkm.fairseq_patches.registry import patch, selected, setting, wrap


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


@pytest.fixture
def declared(monkeypatch):
    """Two patches of this file and a module that they change."""
    monkeypatch.setattr(registry, "PATCHES", {})
    module = SimpleNamespace(__name__="module", function=lambda x: x, setting=0)
    monkeypatch.setattr(registry.inspect, "ismodule", lambda owner: owner is module)

    @patch(module, "function", why="It is too small", until="it is not")
    def larger(function):
        return lambda x: function(x) + 1

    @setting("module.setting", why="It is 0", until="it is 1")
    def one():
        module.setting = 1

    return module


@pytest.mark.parametrize(
    ("selection", "made"),
    [
        ("", ["larger", "one"]),
        ("-test_registry.one", ["larger"]),
        (" test_registry.one,", ["one"]),
        ("test_registry,-test_registry.larger", ["one"]),
        ("-test_registry", []),
    ],
)
def test_patches_are_switched_by_name_and_by_subject(declared, selection, made):
    assert [patch.name for patch in selected(selection)] == [f"test_registry.{name}" for name in made]
    for _ in range(2):
        registry.apply(selection)
    assert (declared.function(1), declared.setting) == (1 + ("larger" in made), int("one" in made))


def test_an_unknown_patch_is_refused(declared):
    with pytest.raises(RKMError, match="no patch or subject 'nothing'"):
        registry.apply("-nothing")


def one_more(function):
    return lambda *args: function(*args) + 1


def test_two_wrappers_of_one_function_are_both_made_once():
    module = SimpleNamespace(function=abs)
    for _ in range(2):
        wrap(module, "function", doubled)
        wrap(module, "function", one_more)
    assert module.function(-3) == 7


def test_every_patch_says_why_and_until_when():
    fairseq_rkm.register()
    assert len(registry.PATCHES) > 20
    assert all(declared.why and declared.until for declared in registry.PATCHES.values())


def test_the_list_is_printed(capsys, monkeypatch):
    monkeypatch.setenv(registry.SWITCH, "-shutdown")
    print_list()
    rows = [line for line in capsys.readouterr().out.splitlines() if "`" in line]
    assert len(rows) == len(registry.PATCHES)
    assert all(row.startswith("| * |") != ("`shutdown." in row) for row in rows)
