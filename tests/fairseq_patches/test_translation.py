import io
import logging
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from fairseq import utils
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.tasks.translation import TranslationConfig

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.data.sentencepieces import check_pieces
from fairseq_rkm.fairseq_patches.translation import check_languages, check_sizes


@pytest.fixture(scope="module", autouse=True)
def _adapted():
    fairseq_rkm.register()


def test_adapting_twice_wraps_once():
    once = utils.replace_unk, utils.load_align_dict
    fairseq_rkm.register()
    assert (utils.replace_unk, utils.load_align_dict) == once


def test_unknown_words_are_replaced_by_those_they_look_at():
    pairs = [(1, 0), (2, 1), (0, 2)]
    assert utils.replace_unk("<unk> b <unk>", "x y z", pairs, {}, "<unk>") == "y b x"
    assert utils.replace_unk("<unk> b <unk>", "x y z", pairs, {"x": "Ex"}, "<unk>") == "y b Ex"
    weights = [["0.2", "0.5", "0.0", "0.3"], ["0.1", "0.1", "0.2", "0.6"]]
    assert utils.replace_unk("<unk> <unk>", "x y z", weights, {}, "<unk>") == "y z", "the last column is the end's"


def test_replace_unk_without_a_file_copies(tmp_path):
    assert utils.load_align_dict(None) is None
    assert utils.load_align_dict("@@ ") == {}, "what fairseq makes of the flag alone"
    (tmp_path / "pairs").write_text("x Ex\n")
    assert utils.load_align_dict(str(tmp_path / "pairs")) == {"x": "Ex"}


def folder(path, *names):
    for name in names:
        (path / name).touch()
    return path


def test_language_pairs(tmp_path):
    data = folder(tmp_path, "dict.de.txt", "dict.en.txt", "train.de-en.de.idx", "train.de-en.en.idx")
    check_languages(TranslationConfig(data=str(data)))
    check_languages(TranslationConfig(data=str(data), source_lang="en", target_lang="de"))
    with pytest.raises(RKMError, match=r"--target-lang fr: there is no dict.fr.txt in .*dictionaries of de, en"):
        check_languages(TranslationConfig(data=str(data), source_lang="de", target_lang="fr"))
    for missing in (None, "", str(tmp_path / "nowhere")):
        with pytest.raises(RKMError, match="no folder of binarized data"):
            check_languages(TranslationConfig(data=missing))


def test_languages_that_cannot_be_told(tmp_path):
    data = folder(tmp_path, "dict.de.txt")
    with pytest.raises(RKMError, match=r"give --source-lang and --target-lang: .*dictionaries of de"):
        check_languages(TranslationConfig(data=str(data)))


def dictionary(symbols):
    made = Dictionary()
    for symbol in symbols:
        made.add_symbol(symbol)
    return made


def pairs(lengths):
    words = dictionary(["a"])
    sentences = [torch.full((n,), 4) for n in lengths]
    return LanguagePairDataset(sentences, lengths, words, sentences, lengths, words)


def test_sentences_beyond_the_limit_are_named():
    dataset = pairs([3, 9, 4])
    indices = dataset.ordered_indices()
    check_sizes(dataset, indices, (9, 9), False)
    check_sizes(dataset, indices, None, False)
    check_sizes(dataset, indices, (8, 9), True)
    with pytest.raises(RKMError, match=r"sentence 1 of 3 .* has 9 tokens and its translation 9, more than the 8 of"):
        check_sizes(dataset, indices, (8, 9), False)


def test_empty_sentences_are_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    dataset = pairs([3, 1, 1])
    check_sizes(dataset, dataset.ordered_indices(), (9, 9), False)
    assert "2 of 3 source sentences have no words (the first is number 1, counted from 0)" in caplog.text


TEXT = ["the quick brown fox jumps over the lazy dog", "a lazy fox sleeps", "what does the brown dog say", "über größe"]


def pieces_of(text, path, vocabulary):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=vocabulary, hard_vocab_limit=False,
        minloglevel=3,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(path)))


def test_a_sentencepiece_model_must_have_made_the_dictionary(tmp_path):
    ours = pieces_of(TEXT, tmp_path / "ours", 60)
    words = dictionary(piece for line in [*TEXT, "日本 fox"] for piece in ours.encode(line).split())
    assert "日本" in words.symbols, "characters that the model does not know come out as they are"
    words.add_symbol("madeupword0000")
    check_pieces(ours, words)
    other = pieces_of([line[::-1] for line in TEXT], tmp_path / "other", 60)
    with pytest.raises(RKMError, match="does not fit the source's dictionary"):
        check_pieces(other, words)
    check_pieces(SimpleNamespace(), words)
