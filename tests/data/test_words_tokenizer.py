import pytest
from fairseq.data import encoders
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fairseq_rkm

fairseq_rkm.register()
words = encoders.build_tokenizer(OmegaConf.create({"_name": "words"}))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("in 1941.The film ( 90 min )", "in 1941 . The film ( 90 min )"),
        ("in 1941 . The film (90 min)", "in 1941 . The film ( 90 min )"),
        ("Don't!?", "Don ' t ! ?"),
        ("Kogłuktuałuk, 青春", "Kogłuktuałuk , 青春"),
        (" \t\n", ""),
    ],
)
def test_words_and_marks(text, tokens):
    assert words.encode(text) == tokens
    assert words.decode(tokens) == tokens


@given(st.text())
def test_nothing_but_white_space_is_lost_and_a_second_time_changes_nothing(text):
    tokens = words.encode(text)
    assert tokens.replace(" ", "") == "".join(text.split())
    assert words.encode(tokens) == tokens
