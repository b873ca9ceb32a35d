import json

import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.data.preparation import FILE, Preparation


def test_tokens_depend_on_white_space_only_as_far_as_it_separates():
    preparation = Preparation(["a", "b"], lowercase=True)
    assert preparation.tokens('Wall St.\r\n\tBears\u2028"claw" back') == 'wall st. bears " claw " back'
    assert preparation.tokens("  \n ") == ""
    assert Preparation(["a"], tokenizer="space").tokens("Don't  touch\nthis") == "Don't touch this"
    assert Preparation(["a"], tokenizer="words", lowercase=True).tokens("Don't  touch\nthis") == "don ' t touch this"


def test_ascii_keeps_letters_without_their_accents():
    preparation = Preparation(["a"], tokenizer="space", ascii=True)
    assert preparation.tokens("Café “Größe” 1976\u20131997 ﬁn Łódź ½") == "Cafe Groe 19761997 fin odz 12"
    assert preparation.tokens("東京") == ""


def test_saved_and_loaded_it_is_the_same(tmp_path):
    saved = Preparation(["Science & Mathematics", "Größe"], "moses", "de", True, True, folder=tmp_path)
    saved.save()
    assert Preparation.load(tmp_path) == saved
    values = json.loads((tmp_path / FILE).read_text())
    del values["ascii"]
    (tmp_path / FILE).write_text(json.dumps(values))
    assert Preparation.load(tmp_path).ascii is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no .*preparation.json: it tells how text is tokenised"),
        ("{", "is not JSON"),
        ("[]", "must have the keys classes, tokenizer"),
        ("{}", "must have the keys classes, tokenizer"),
        ({"classes": "World"}, "classes must be a list of names"),
        ({"classes": [1]}, "classes must be a list of names"),
        ({"tokenizer": "nltk"}, "tokenizer one of moses, words, space"),
    ],
)
def test_a_file_that_is_missing_or_broken(tmp_path, text, message):
    if isinstance(text, dict):
        Preparation(["a"], folder=tmp_path).save()
        text = json.dumps({**json.loads((tmp_path / FILE).read_text()), **text})
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(RKMError, match=message):
        Preparation.load(tmp_path)


def test_a_missing_sentencepiece_model(tmp_path):
    with pytest.raises(RKMError, match=r"sentencepiece.bpe.model, which is missing: copy it there"):
        Preparation(["a"], sentencepiece=True, folder=tmp_path).tokens("text")
