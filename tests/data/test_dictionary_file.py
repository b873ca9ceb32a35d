"""Damaged dictionaries are told by file and line; those that fairseq takes rightly are taken."""

import pytest
from fairseq.data import Dictionary
from hypothesis import given, settings
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm import RKMError

GOOD = "the 5\nof 4\nà 3\nmadeupword0000 0\n"


@pytest.fixture(autouse=True, scope="module")
def _registered():
    fairseq_rkm.register()


def load(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Dictionary.load(str(path)).symbols[4:]


@pytest.mark.parametrize(
    "content", [GOOD, GOOD.replace("\n", "\r\n"), GOOD.rstrip("\n"), GOOD + "of 4 #fairseq:overwrite\n"]
)
def test_what_is_taken(tmp_path, content):
    assert load(tmp_path / "dict.txt", content)[:4] == ["the", "of", "à", "madeupword0000"]


ODD = [
    ("the 5\n\nof 4\n", "line 2: is blank"),
    ("the 5\n   \nof 4\n", "line 2: is blank"),
    ("the\t5\nof\t4\n", r"line 1: a tab, where one space should part a symbol from its count: 'the\\t5'"),
    ("the 5\nof 4\nthe 3\n", "line 3: the symbol 'the' has stood on line 1 before"),
    ("the\nof\n", "line 1: no count after the symbol: 'the'"),
    ("the 5\nof 4.0\n", "line 2: no count after the symbol: 'of 4.0'"),
    ("the 5\nof -4\n", "line 2: no count"),
    ("the 5\n 4\n", "line 2: no"),
    ("the 5\n<pad> 4\n", "line 2: the symbol '<pad>' is one that fairseq adds by itself"),
    ("</s> 5\n", "line 1: the symbol '</s>' is one that"),
    ("\ufeffthe 5\n", "line 1: begins with a byte order mark"),
    ("the 5\nà 4\n".encode("latin1"), r"line 2, byte 1 \(0xe0\): not UTF-8"),
    ("the 5\n".encode("utf-16"), "is UTF-16"),
    ("the 5\nof " + "9" * 5000, "line 2: no count"),
]
"""What was tried: a dictionary's content, and what is said."""


@pytest.mark.parametrize(("content", "message"), ODD)
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(RKMError, match=message) as caught:
        load(tmp_path / "dict.txt", content)
    assert str(tmp_path / "dict.txt") in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(GOOD.encode()) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_any_damage_ends_in_a_sentence_or_in_a_dictionary(tmp_path_factory, at, value, cut):
    content = bytearray(GOOD.encode())
    content[at : None if cut else at + 1] = [value]
    try:
        symbols, told = load(tmp_path_factory.mktemp("dict") / "dict.txt", bytes(content)), None
    except RKMError as error:
        symbols, told = [], str(error)
    assert told is None or ", line " in told or "UTF-16" in told
    assert len(symbols) == len(set(symbols))
