from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary, indexed_dataset
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask

import fairseq_rkm
from fairseq_rkm import RKMError


@pytest.fixture(autouse=True)
def _registered():
    fairseq_rkm.register()


def write(folder: Path, kind: str, symbols: str, lines: list[str], split: str = "train") -> None:
    """A binarized split and its dictionary."""
    dictionary = Dictionary()
    for symbol in symbols.split():
        dictionary.add_symbol(symbol)
    (folder / kind).mkdir(parents=True, exist_ok=True)
    dictionary.save(str(folder / kind / "dict.txt"))
    path = str(folder / kind / split)
    builder = indexed_dataset.make_builder(f"{path}.bin", "mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
    builder.finalize(f"{path}.idx")


def task(folder: Path, labels: list[str], **flags) -> SentencePredictionTask:
    write(folder, "input0", "a b c d e f g h", ["a h a", "", "b"])
    write(folder, "label", "1 2 3", labels)
    cfg = SentencePredictionConfig(**{
        "data": str(folder), "num_classes": 3, "regression_target": False, "seed": 1, "no_shuffle": True, **flags,
    })  # fmt: skip
    return SentencePredictionTask.setup_task(cfg)


def test_labels_within_the_dictionary_are_taken(tmp_path):
    dataset = task(tmp_path, ["1", "3", "2"]).load_dataset("train")
    assert torch.cat([dataset[i]["target"] for i in range(3)]).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("labels", "flags", "message"),
    [
        (["1", "2", "7"], {}, "the label of document 3 is not in label/dict.txt"),
        (["1", "1 2", "1"], {}, "document 2 has 2 labels; a label is one word a line"),
        (["1", "", "1"], {}, "document 2 has 0 labels"),
        (["1", "2"], {}, "has 2 labels for 3 documents"),
        (["1", "2", "3"], {"num_classes": 2}, "document 3 is of class 3 of label/dict.txt, but --num-classes is 2"),
        (["1", "2", "3"], {"max_positions": 3}, "1 documents of more than --max-positions 3 tokens, the longest of 4"),
    ],
)
def test_what_would_be_lost_or_fail_in_the_midst_of_training_is_told_before(tmp_path, labels, flags, message):
    with pytest.raises(RKMError, match=message):
        task(tmp_path, labels, **flags).load_dataset("train")


def test_documents_that_are_to_be_cut_are_not_too_long(tmp_path):
    dataset = task(tmp_path, ["1", "2", "3"], max_positions=3, shorten_method="truncate").load_dataset("train")
    assert dataset.num_tokens(0) == 3


def test_the_number_of_classes_must_be_given(tmp_path):
    with pytest.raises(RKMError, match=r"needs --num-classes, the number of classes; .*label/dict.txt has 3"):
        task(tmp_path, ["1", "2", "3"], num_classes=-1)


def test_missing_and_empty_files(tmp_path):
    built = task(tmp_path, ["1", "2", "3"])
    with pytest.raises(RKMError, match=r"no binarized split 'valid' at .*input0/valid.bin"):
        built.load_dataset("valid")
    write(tmp_path, "input0", "a b", [], "valid")
    with pytest.raises(RKMError, match=r"the split 'valid' at .*input0/valid.bin is empty"):
        built.load_dataset("valid")
    for kind in ("label", "input0"):
        (tmp_path / kind / "dict.txt").unlink()
        with pytest.raises(RKMError, match=rf"no dictionary at .*{kind}/dict.txt"):
            SentencePredictionTask.setup_task(built.cfg)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "--regression-target needs .*train.label"),
        (["1", "2"], "has 2 lines for 3 documents"),
        (["1", "two", "3"], "line 2: 'two' is not --num-classes 1 finite numbers"),
        (["1", "nan", "3"], "line 2: 'nan' is not"),
        (["1", "2", "3 4"], "line 3: '3 4' is not"),
        (["1", "", "3"], "line 2: '' is not"),
    ],
)
def test_a_regression_needs_its_numbers(tmp_path, lines, message):
    write(tmp_path, "input0", "a b", ["a b a", "", "b"])
    if lines is not None:
        (tmp_path / "label").mkdir()
        (tmp_path / "label" / "train.label").write_text("\n".join(lines) + "\n")
    cfg = SentencePredictionConfig(data=str(tmp_path), num_classes=1, regression_target=True, seed=1)
    with pytest.raises(RKMError, match=message):
        SentencePredictionTask.setup_task(cfg).load_dataset("train")


def test_a_regression_needs_no_label_dictionary(tmp_path):
    write(tmp_path, "input0", "a b", ["a b a", "", "b"])
    (tmp_path / "label").mkdir()
    (tmp_path / "label" / "train.label").write_text("1\n-2.5\n3e-3\n")
    cfg = SentencePredictionConfig(data=str(tmp_path), num_classes=1, regression_target=True, seed=1)
    assert len(SentencePredictionTask.setup_task(cfg).load_dataset("train")) == 3
