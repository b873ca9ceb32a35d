import pytest
import torch
from fairseq.data import Dictionary
from torch import nn

from fairseq_rkm import RKMError
from fairseq_rkm.data.word_vectors import load_word_vectors


@pytest.fixture
def dictionary():
    words = Dictionary()
    for word in ("cat", "dog", "naïve"):
        words.add_symbol(word)
    return words


@pytest.mark.parametrize("header", ["", "2 3\n", "\ufeff"])
def test_rows_of_known_words_are_overwritten_and_coverage_is_logged(tmp_path, dictionary, header, caplog):
    file = tmp_path / "vectors.txt"
    file.write_text(header + "dog 1 2 3\nnaïve -1 0.5 1e-2 \nowl 7 8 9\n", encoding="utf-8")
    embedding = nn.Embedding(len(dictionary), 3)
    before = embedding.weight.detach().clone()
    with caplog.at_level("INFO"):
        load_word_vectors(embedding, str(file), dictionary)
    assert embedding.weight[dictionary.index("dog")].tolist() == [1, 2, 3]
    torch.testing.assert_close(embedding.weight[dictionary.index("naïve")].tolist(), [-1.0, 0.5, 0.01])
    assert torch.equal(embedding.weight[dictionary.index("cat")], before[dictionary.index("cat")])
    assert f"2 of the dictionary's {len(dictionary)} types" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat 1 2 3\ndog 1 2\n", "line 2: 2 numbers, but the embedding has 3 dimensions"),
        ("cat 1 2 3 4\n", "line 1: 4 numbers, but the embedding has 3 dimensions"),
        ("1 4\ncat 1 2 3 4\n", "line 2: 4 numbers, but the embedding has 3 dimensions"),
        ("cat 1 2 x\n", "line 1: not a word and 3 numbers"),
        ("cat 1 nan 3\n", "line 1: a number that is not finite"),
        ("cat 1 1e60 3\n", "line 1: a number that is not finite"),
        ("Katze 1 2 3\nHund 4 5 6\n", "has none of the dictionary's 3 words: is it of another language"),
        ("<unk> 1 2 3\n", "has none of the dictionary's 3 words"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_line(tmp_path, dictionary, text, message):
    file = tmp_path / "vectors.txt"
    file.write_text(text)
    with pytest.raises(RKMError, match=message):
        load_word_vectors(nn.Embedding(len(dictionary), 3), str(file), dictionary)
    with pytest.raises(RKMError, match=r"no file of word vectors at .*none.txt"):
        load_word_vectors(nn.Embedding(len(dictionary), 3), str(tmp_path / "none.txt"), dictionary)


def test_words_with_spaces_are_passed_over(tmp_path, dictionary, caplog):
    file = tmp_path / "vectors.txt"
    file.write_text("cat 1 2 3\nat name@domain.com 4 5 6\ndog 7 8 9\n")
    embedding = nn.Embedding(len(dictionary), 3)
    with caplog.at_level("INFO"):
        load_word_vectors(embedding, str(file), dictionary)
    assert embedding.weight[dictionary.index("dog")].tolist() == [7, 8, 9]
    assert f"2 of the dictionary's {len(dictionary)} types ({200 / len(dictionary):.1f}%)" in caplog.text
