import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKMError
from fairseq_rkm.data.preparation import PREPARATION_FILE, SENTENCEPIECE_MODEL, Preparation


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
    values = json.loads((tmp_path / PREPARATION_FILE).read_text())
    del values["ascii"]
    (tmp_path / PREPARATION_FILE).write_text(json.dumps(values))
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
        text = json.dumps({**json.loads((tmp_path / PREPARATION_FILE).read_text()), **text})
    if text is not None:
        (tmp_path / PREPARATION_FILE).write_text(text)
    with pytest.raises(RKMError, match=message):
        Preparation.load(tmp_path)


def test_a_missing_sentencepiece_model(tmp_path):
    with pytest.raises(RKMError, match=r"sentencepiece.bpe.model, which is missing: copy it there"):
        Preparation(["a"], sentencepiece=True, folder=tmp_path).tokens("text")


def saved(folder, **flags):
    (folder / "label").mkdir()
    (folder / "label" / "dict.txt").write_text("1 5\n2 4\n")
    preparation = Preparation(["World", "Sports"], "space", folder=folder, **flags)
    preparation.save()
    return preparation


def change(folder, **values):
    path = folder / PREPARATION_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_swapped_classes_and_another_dictionary_of_labels_are_noticed(tmp_path):
    preparation = saved(tmp_path)
    assert Preparation.load(tmp_path) == preparation
    change(tmp_path, classes=["Sports", "World"])
    with pytest.raises(RKMError, match=r"the classes in it have changed since .*delete the entry 'classes'"):
        Preparation.load(tmp_path)
    change(tmp_path, checksums={})  # meant, or written before there were checksums
    assert Preparation.load(tmp_path).classes == ["Sports", "World"]
    preparation.save()
    (tmp_path / "label" / "dict.txt").write_text("2 5\n1 4\n")
    with pytest.raises(RKMError, match=r"dict.txt has changed since it was written"):
        Preparation.load(tmp_path)


@pytest.mark.parametrize("values", [{"lowercase": "false"}, {"sentencepiece": 1}, {"language": None}])
def test_flags_of_another_kind(tmp_path, values):
    saved(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(RKMError, match="must be true or false, and language a name"):
        Preparation.load(tmp_path)


@pytest.fixture(scope="module")
def pieces():
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog", "a quick dog and a lazy fox", "over and over the brown dog"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, vocab_size=32, minloglevel=2
    )
    return model.getvalue()


@settings(max_examples=50, deadline=None)
@given(data=st.data(), cut=st.booleans())
def test_any_change_of_a_sentencepiece_model_is_noticed(tmp_path_factory, pieces, data, cut):
    folder = tmp_path_factory.mktemp("data")
    (folder / SENTENCEPIECE_MODEL).write_bytes(pieces)
    saved(folder, sentencepiece=True)
    assert Preparation.load(folder).tokens("the lazy dog")
    at = data.draw(st.integers(0, len(pieces) - 1))
    damaged = bytearray(pieces)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / SENTENCEPIECE_MODEL).write_bytes(damaged[:at] if cut else damaged)
    with pytest.raises(RKMError, match=r"sentencepiece.bpe.model has changed since it was written"):
        Preparation.load(folder)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x0a\xff\xff\xff\xff"])
def test_without_a_checksum_what_is_no_model_is_told(tmp_path, content):
    (tmp_path / SENTENCEPIECE_MODEL).write_bytes(content)
    with pytest.raises(RKMError, match=r"sentencepiece.bpe.model is damaged"):
        Preparation(["a"], sentencepiece=True, folder=tmp_path).tokens("text")
