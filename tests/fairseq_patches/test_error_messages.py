import pytest

from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches.error_messages import DIVERGED, sentence_of


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RKMError("ngram must be at least 1"), "ngram must be at least 1"),
        (RuntimeError("-- Process 1 ended:\nfairseq_rkm.errors.RKMError: no data\n"), "no data"),
        (FloatingPointError("Minimum loss scale reached"), "Minimum loss scale reached"),
        (FloatingPointError("gradients are Nan/Inf"), DIVERGED),
        (RuntimeError("-- Process 1 ended:\nFloatingPointError: gradients are Nan/Inf\n"), DIVERGED),
        (Exception("Cannot load model parameters"), "Cannot load model parameters"),
        (RuntimeError("a defect"), None),
        (KeyError("a defect"), None),
    ],
)
def test_what_is_told_in_a_sentence(error, sentence):
    assert sentence_of(error) == sentence
    later = TypeError("while that was handled")
    later.__context__ = error
    assert sentence_of(later) == sentence
