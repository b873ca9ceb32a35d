import ast

import pytest
from fairseq import utils
from hypothesis import given
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm.checkpoints.literals import NotALiteralError, evaluate

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
)


@given(VALUES.filter(lambda value: "inf" not in repr(value)))
def test_literals_are_what_python_reads(value):
    assert evaluate(repr(value)) == ast.literal_eval(repr(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "[(512, 3)] * 20",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4",
        "(0.9, 0.98)",
        " -1e-3",
        "4,2",
        "True",
        "2 ** -10",
        "{1}",
    ],
)
def test_arithmetic_that_flags_are_written_in(text):
    assert evaluate(text) == eval(text.strip())  # noqa: S307


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "x", "().__class__", "[x for x in (1, 2)]", "lambda: 1", "f'{1}'",
        "[1][0]", "[0] * 10**9", "[[0] * 1000] * 1000", "'a' * 10**9", "9 ** 9 ** 9", "10 ** 400", "2 ** 65",
        "(-1) ** 0.5", "print(1)",
        "1 / 0", "(" * 500, "[" * 5000, "'%1000000000d' % 1", "", "1 +", "\x00", "9" * 5000, "1" * 20000,
        "{**{}}", "...",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(NotALiteralError):
        evaluate(text)


def test_what_is_no_text_is_refused_as_eval_does():
    fairseq_rkm.register()
    with pytest.raises(TypeError, match="must be a string"):
        evaluate(5)
    assert utils.eval_bool("True") is True
    assert utils.eval_bool(None, default=True) is True
    assert utils.eval_str_list("0.25,0.5") == [0.25, 0.5]
