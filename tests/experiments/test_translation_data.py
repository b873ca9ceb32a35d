import re
from argparse import Namespace

import pytest
from parallel_text import write_text

from fairseq_rkm.experiments import translation_data as prepare


def arguments(text, **flags):
    return Namespace(
        **{
            "text": text,
            "source_lang": "de",
            "target_lang": "en",
            "train": "train",
            "valid": None,
            "test": None,
            **flags,
        }
    )


def test_files_are_found_by_their_usual_names(tmp_path):
    text = write_text(tmp_path, train=["a"], dev=["a"], test_2017=["a"], test_2016=["a"])
    assert prepare.name_splits(arguments(text)) == {
        "train": "train", "valid": "dev", "test": "test_2016", "test1": "test_2017"
    }  # fmt: skip
    assert prepare.name_splits(arguments(text, valid="v", test=["t"])) == {"train": "train", "valid": "v", "test": "t"}


def test_text_that_is_not_parallel_is_refused(tmp_path):
    text = write_text(tmp_path, train=["a", "b"], val=["a"])
    with pytest.raises(SystemExit, match=r"has no test\*.en"):
        prepare.name_splits(arguments(text))
    with pytest.raises(SystemExit, match=r"has no test.de \(nor .gz or .xz\)"):
        prepare.read_pairs(text, "test", ("de", "en"), keep_empty=True)
    (text / "train.de").write_text("a\n")
    with pytest.raises(SystemExit, match=r"train.de has 1 lines and .*train.en.gz 2"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)
    (text / "train.de").write_bytes(b"a\nb\xff\n")
    with pytest.raises(SystemExit, match=r"line 2, byte 2 \(0xff\): not UTF-8"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)
    (text / "train.en.gz").write_bytes((text / "train.en.gz").read_bytes()[:15])
    (text / "train.de").write_text("a\nb\n")
    with pytest.raises(SystemExit, match=r"train.en.gz is damaged"):
        prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False)


def test_empty_lines_are_left_out_of_training_and_refused_in_tests(tmp_path, capsys):
    text = write_text(tmp_path, train=["a", "b", "c"], test=["a", "", "c"])
    (text / "train.de").write_text("a\n\nc\n")
    assert prepare.read_pairs(text, "train", ("de", "en"), keep_empty=False) == [("a", "a"), ("c", "c")]
    assert "1 pairs with an empty side are left out, the first of them line 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="line 2 of test is empty in one language"):
        prepare.read_pairs(text, "test", ("de", "en"), keep_empty=True)


@pytest.mark.parametrize(
    ("size", "advice"),
    [
        (8000, r"too small for a vocabulary of 8,000 .*: give --vocabulary \(for run.sh VOCABULARY\) (\d+) or fewer"),
        (3, r"3 subwords does not hold .*: give --vocabulary \(for run.sh VOCABULARY\) (\d+) or more"),
    ],
)
def test_a_vocabulary_that_does_not_suit_the_text_is_told_with_one_that_does(tmp_path, size, advice):
    lines = ["the quick brown fox jumps over the lazy dog", "what does the brown dog say"] * 20
    with pytest.raises(SystemExit) as told:
        prepare.learn_pieces(iter(lines), size, tmp_path / "pieces")
    suits = int(re.search(advice, str(told.value))[1])
    assert prepare.learn_pieces(iter(lines), suits, tmp_path / "pieces").vocab_size() == suits
