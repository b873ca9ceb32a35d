import pytest
import torch
from fairseq.data import Dictionary

from fairseq_rkm import RKMError
from fairseq_rkm.data.dictionary import check_fingerprint, fingerprint


def dictionary(*words):
    result = Dictionary()
    for word in words:
        result.add_symbol(word)
    return result


def test_a_fingerprint_tells_words_and_their_order():
    own = fingerprint(dictionary("a", "b"))
    assert torch.equal(own, fingerprint(dictionary("a", "b")))
    for other in (dictionary("b", "a"), dictionary("a"), dictionary("a", "c")):
        assert not torch.equal(own, fingerprint(other))
        with pytest.raises(RKMError, match="trained with another dictionary"):
            check_fingerprint({"key": own}, "key", fingerprint(other))


def test_it_survives_the_averaging_of_checkpoints():
    own = fingerprint(dictionary("a", "b"))
    check_fingerprint({"key": (own + own + own) // 3}, "key", own)


def test_a_checkpoint_without_one_is_given_its_own():
    state: dict = {}
    own = fingerprint(dictionary("a"))
    check_fingerprint(state, "key", own)
    assert torch.equal(state["key"], own)
