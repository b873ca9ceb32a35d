"""Damage to binarized data, at any place, is found, or is none; the kinds that were tried stand in a table."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, data_utils, indexed_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.data.indexed_check import check_split

SENTENCES = [[4, 5, 6, 2], [2], [7, 7, 2], [4, 2]]


@pytest.fixture(autouse=True, scope="module")
def _registered():
    fairseq_rkm.register()


def dictionary(words=4):
    made = Dictionary()
    for i in range(words):
        made.add_symbol(f"w{i}")
    return made


def write(prefix: Path, impl: str, sentences=SENTENCES) -> dict[str, bytes]:
    """A split as fairseq writes it, and its two files' contents."""
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl, vocab_size=8)
    for sentence in sentences:
        builder.add_item(torch.tensor(sentence))
    builder.finalize(f"{prefix}.idx")
    return {end: Path(f"{prefix}.{end}").read_bytes() for end in ("bin", "idx")}


def load(prefix: Path, impl: str | None = None):
    """What fairseq's tasks do; all sentences."""
    data = data_utils.load_indexed_dataset(str(prefix), dictionary(), impl)
    if getattr(data, "supports_prefetch", False):
        data.prefetch(range(len(data)))
    return [data[i].tolist() for i in range(len(data))]


@pytest.mark.parametrize("impl", ["mmap", "cached", "lazy"])
def test_whole_data_passes(tmp_path, impl):
    write(tmp_path / "train", "mmap" if impl == "mmap" else "cached")
    assert load(tmp_path / "train", impl) == SENTENCES
    assert load(tmp_path / "train") == SENTENCES
    check_split(str(tmp_path / "nothing"), dictionary())


@settings(max_examples=300, deadline=None)
@given(impl=st.sampled_from(["mmap", "cached"]), end=st.sampled_from(["bin", "idx"]), data=st.data())
def test_any_damage_is_told_in_a_sentence_or_leaves_tokens_of_the_dictionary(tmp_path_factory, impl, end, data):
    prefix = tmp_path_factory.mktemp("data") / "train"
    content = bytearray(write(prefix, impl)[end])
    kind = data.draw(st.sampled_from(["flip", "set", "cut", "grow", "zero"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "set":
        content[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content += bytes(data.draw(st.integers(1, 20)))
    else:
        content[at : at + 16] = bytes(len(content[at : at + 16]))
    Path(f"{prefix}.{end}").write_bytes(content)
    try:
        found, told = load(prefix), ""
    except RKMError as error:
        found, told = None, str(error)
    if found is None:
        assert str(prefix) in told
        assert "fairseq-preprocess" in told or "was there text" in told
    else:
        assert [len(sentence) for sentence in found] == [len(sentence) for sentence in SENTENCES]
        assert end == "bin" or found == SENTENCES
        assert all(0 <= token < len(dictionary()) for sentence in found for token in sentence)


def bin_of(tokens, dtype="<u2"):
    return np.array(tokens, dtype).tobytes()


FLAT = [token for sentence in SENTENCES for token in sentence]
SIZES = struct.pack("<4i", 4, 1, 3, 2)
DAMAGED = [
    ("bin", lambda _: bin_of([*FLAT[:6], 8, *FLAT[7:]]), r"train.bin, sentence 3: token 2 is number 8, .* has 0 to 7"),
    ("bin", lambda _: bin_of([60000, *FLAT[1:]]), "sentence 1: token 1 is number 60000"),
    ("bin", lambda b: b[:-2], "has 18 bytes, and by train.idx 20: it is cut off"),
    ("bin", lambda _: b"", "train.bin is empty"),
    ("bin", lambda _: None, "train.bin is missing, beside train.idx"),
    ("idx", lambda _: None, "train.idx is missing, beside train.bin"),
    ("idx", lambda _: b"", "damaged, or no index of fairseq's"),
    ("idx", lambda b: b"X" + b[1:], r"damaged, or no index of fairseq's: it begins with b'XMIDIDX"),
    ("idx", lambda b: b[:20], "its header does not fit its 20 bytes"),
    ("idx", lambda b: b[:-1], "its header does not fit"),
    ("idx", lambda b: b[:17] + b"\x63" + b[18:], "its header does not fit"),
    ("idx", lambda b: b[:17] + b"\x05" + b[18:], "sentence 2 is not where the one before ends"),
    ("idx", lambda b: b[:18] + b"\xff" * 8 + b[26:], "its header does not fit"),
    ("idx", lambda b: b.replace(SIZES, struct.pack("<4i", 4, 1, -3, 2)), "sentence 3 is not where"),
    ("idx", lambda b: b.replace(SIZES, struct.pack("<4i", 5, 0, 3, 2)), "sentence 2 is not where"),
]
"""What was tried by hand: the file, what is made of it (None: it is deleted), and what is said."""


@pytest.mark.parametrize("at", [88, 128])
def test_numbers_that_overflow_to_the_right_ones_are_damage(tmp_path, at):
    """A first place, or a first length, of 2^62 more: times 4 bytes, it would be as before."""
    content = bytearray(write(tmp_path / "train", "cached")["idx"])
    content[at + 7] ^= 1 << 6
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(RKMError, match="its header does not fit"):
        load(tmp_path / "train")


@pytest.mark.parametrize(("end", "damage", "message"), DAMAGED)
def test_kinds_of_damage(tmp_path, end, damage, message):
    content = damage(write(tmp_path / "train", "mmap")[end])
    path = tmp_path / f"train.{end}"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RKMError, match=message):
        load(tmp_path / "train")


def test_data_of_a_larger_dictionary_is_refused_in_the_older_layout_too(tmp_path):
    write(tmp_path / "train", "cached", [[4, 2], [5, 8, 2]])
    with pytest.raises(RKMError, match="sentence 2: token 2 is number 8, and the dictionary has 0 to 7"):
        load(tmp_path / "train")


def test_raw_text_that_is_not_utf8(tmp_path):
    (tmp_path / "train").write_bytes(b"w0 w1\nw2 w\xe9\n")
    with pytest.raises(RKMError, match=r"train, line 2, byte 5 \(0xe9\): not UTF-8; convert the file \(iconv"):
        data_utils.load_indexed_dataset(str(tmp_path / "train"), dictionary(), "raw")
