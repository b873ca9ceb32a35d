"""Evaluate Python literals and arithmetic on them, the notation of fairseq's flags, without ``eval``."""

import ast
import operator
from collections.abc import Callable
from typing import Any

from fairseq_rkm.errors import RKMError

LONGEST_TEXT = 10_000
MOST_ITEMS = 10_000
LARGEST_INTEGER = 2**63

OPERATORS: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
SIGNS: dict[type[ast.unaryop], Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
CONTAINERS = (list, tuple, set, dict)


class NotALiteralError(RKMError):
    """A text that holds more than literals and arithmetic on them."""


def evaluate(text: Any, *_: Any) -> Any:
    """Return the value of a text.

    >>> evaluate("[(512, 3)] * 2"), evaluate("(0.9, 0.98)"), evaluate("1e-3"), evaluate("True")
    ([(512, 3), (512, 3)], (0.9, 0.98), 0.001, True)

    Args:
        text: numbers, strings, None, True, False, lists, tuples, sets and dicts of them, and arithmetic on numbers and
            lists. Names, calls, attributes, subscripts and comprehensions are refused.

    Raises:
        NotALiteralError: anything else, or a value of more than 10,000 items or beyond 64 bits.
        TypeError: ``text`` is not text; ``eval`` raises the same.
    """
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"eval() arg 1 must be a string, bytes or code object, not {type(text).__name__}")
    if len(text) > LONGEST_TEXT:
        raise NotALiteralError(f"a value of {len(text)} characters: the longest may have {LONGEST_TEXT}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except NotALiteralError:
        raise
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise _refused(text, str(error)) from error
    if _items(value) > MOST_ITEMS:
        raise _refused(text, f"at most {MOST_ITEMS} items")
    return value


def _refused(text: Any, reason: str) -> NotALiteralError:
    shown = repr(text if len(text) <= 60 else text[:60] + type(text)(b"..." if isinstance(text, bytes) else "..."))
    return NotALiteralError(
        f"{shown} is not a value that fairseq may evaluate ({reason}): "
        "give numbers, strings, lists or tuples, as in [(512, 3)] * 2"
    )


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes, int, float, type(None))):
        return node.value
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Set):
        return {_value(item) for item in node.elts}
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [key for key in node.keys if key is not None]
        return {_value(key): _value(value) for key, value in zip(keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _combined(node.op, _value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is neither a literal nor arithmetic")


def _combined(sign: ast.operator, left: Any, right: Any) -> Any:
    """Return the result for two numbers, two lists or tuples, or one of these and a number of repetitions."""
    if isinstance(sign, ast.Mod) and not (_is_number(left) and _is_number(right)):
        raise ValueError("% is for numbers")
    if isinstance(sign, ast.Mult):
        count = next((value for value in (left, right) if isinstance(value, int)), 0)
        size = sum(_items(value) for value in (left, right) if isinstance(value, (str, bytes, *CONTAINERS)))
        if count * size > MOST_ITEMS:
            raise ValueError(f"more than {MOST_ITEMS} items")
    if isinstance(sign, ast.Pow) and isinstance(right, (int, float)) and abs(right) > 64:
        raise ValueError("a power above 64")
    value = OPERATORS[type(sign)](left, right)
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError("an integer beyond 64 bits")
    if isinstance(value, complex):
        raise ValueError("a complex number")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _items(value: Any) -> int:
    """Return how many values and characters a value has when written out."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return 1 + sum(_items(key) + _items(item) for key, item in value.items())
    if isinstance(value, CONTAINERS):
        return 1 + sum(map(_items, value))
    return 1
