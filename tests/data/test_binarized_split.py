"""All formats of fairseq-preprocess hold the same tokens."""

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder

from fairseq_rkm import RKMError
from fairseq_rkm.data.binarized_split import open_tokens

LINES = ["a b c", "", "c a", "b"]


@pytest.fixture
def words() -> Dictionary:
    result = Dictionary()
    for word in "abc":
        result.add_symbol(word)
    return result


def write(folder, words, kind, split="train") -> str:
    path = folder / split
    if kind == "raw":
        (folder / f"{split}.None-None").write_text("\n".join(LINES) + "\n")
        return str(path)
    builder = make_builder(f"{path}.bin", "cached" if kind == "lazy" else kind, vocab_size=len(words))
    for line in LINES:
        builder.add_item(words.encode_line(line, add_if_not_exist=False))
    builder.finalize(f"{path}.idx")
    return str(path)


def read(*args, **kwargs) -> list[int]:
    tokens = open_tokens(*args, **kwargs)
    return tokens.read(0, len(tokens)).tolist()


@pytest.mark.parametrize("kind", ["raw", "lazy", "cached", "mmap"])
@pytest.mark.parametrize("said", [False, True])
def test_the_tokens_are_the_same_in_every_format(tmp_path, words, kind, said):
    wanted = torch.cat([words.encode_line(line, add_if_not_exist=False) for line in LINES]).long()
    path = write(tmp_path, words, kind)
    assert read(path, words, kind if said else None) == wanted.tolist()


@pytest.mark.parametrize("kind", ["raw", "mmap"])
def test_parts_of_a_split_are_read_one_after_the_other(tmp_path, words, kind):
    one = read(write(tmp_path, words, kind), words)
    write(tmp_path, words, "cached", "train1")
    write(tmp_path, words, kind, "train2")
    assert read(str(tmp_path / "train"), words, combine=True) == one * 3
    assert read(str(tmp_path / "train"), words) == one
    (tmp_path / "train1.idx").unlink()
    with pytest.raises(RKMError, match=r"train1.idx is missing, beside train1.bin"):
        open_tokens(str(tmp_path / "train"), words, combine=True)


@pytest.mark.parametrize(("kind", "wrong"), [("mmap", "cached"), ("mmap", "raw"), ("lazy", "mmap"), ("raw", "mmap")])
def test_another_format_than_was_said(tmp_path, words, kind, wrong):
    with pytest.raises(RKMError, match=f"--dataset-impl {wrong}: .* leave the flag out"):
        open_tokens(write(tmp_path, words, kind), words, wrong)


def test_no_split_and_an_empty_one(tmp_path, words):
    with pytest.raises(RKMError, match="no binarized split 'train'"):
        open_tokens(str(tmp_path / "train"), words)
    for name in ("train.bin", "train.None-None"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(RKMError, match=r"the split 'train' at .* is empty"):
            open_tokens(str(tmp_path / "train"), words)
        (tmp_path / name).unlink()


def test_huffman_codes_are_refused(tmp_path, words):
    """Their numbers are not the dictionary's."""
    (tmp_path / "train.bin").write_bytes(b"1")
    (tmp_path / "train.idx").write_bytes(b"HUFFIDX\x00\x00")
    for said in (None, "huffman"):
        with pytest.raises(RKMError, match=r"train.idx is of the format huffman, .* with --dataset-impl mmap"):
            open_tokens(str(tmp_path / "train"), words, said)
