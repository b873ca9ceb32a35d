from collections import OrderedDict

import pytest
import torch
from fairseq.data import Dictionary
from torch import nn

from fairseq_rkm import RKMError
from fairseq_rkm.data.dictionary import FINGERPRINT, FORMER, check_fingerprint, fingerprint


def dictionary(*words):
    result = Dictionary()
    for word in words:
        result.add_symbol(word)
    return result


def module(words):
    result = nn.Module()
    result.register_buffer(FINGERPRINT, fingerprint(words))
    return result


def check(state, words):
    check_fingerprint(state, "decoder.", module(words), words)


@pytest.mark.parametrize("key", [FINGERPRINT, FORMER])
def test_a_fingerprint_tells_words_and_their_order(key):
    own = dictionary("a", "b")
    check({f"decoder.{key}": fingerprint(own)}, dictionary("a", "b"))
    for other in (dictionary("b", "a"), dictionary("a"), dictionary("a", "c")):
        with pytest.raises(RKMError, match="trained with another dictionary"):
            check({f"decoder.{key}": fingerprint(own)}, other)


def test_the_message_names_checkpoint_and_file(tmp_path):
    own = dictionary("a", "b")
    own.save(str(tmp_path / "dict.txt"))
    state = OrderedDict({f"decoder.{FINGERPRINT}": fingerprint(dictionary("c"))})
    state.read_from = "run/checkpoint_best.pt"
    message = f"run/checkpoint_best.pt was trained with another dictionary than {tmp_path}/dict.txt"
    with pytest.raises(RKMError, match=message):
        check(state, Dictionary.load(str(tmp_path / "dict.txt")))


def test_it_survives_the_averaging_of_checkpoints():
    own = fingerprint(dictionary("a", "b"))
    check({f"decoder.{FINGERPRINT}": (own + own + own) // 3}, dictionary("a", "b"))


def test_an_older_checkpoint_is_given_the_present_name():
    state = {f"decoder.{FORMER}": fingerprint(dictionary("a"))}
    check(state, dictionary("a"))
    assert list(state) == [f"decoder.{FINGERPRINT}"]


def test_a_checkpoint_without_one_is_given_its_own():
    state: dict = {}
    check(state, dictionary("a"))
    assert torch.equal(state[f"decoder.{FINGERPRINT}"], fingerprint(dictionary("a")))
