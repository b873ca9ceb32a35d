import pytest
import torch

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
        (
            AssertionError("Must specify batch size either with --max-tokens or --batch-size"),
            "no batch size: give --batch-size or --max-tokens (hydra: dataset.batch_size or dataset.max_tokens)",
        ),
        (RuntimeError("a defect"), None),
        (KeyError("a defect"), None),
    ],
)
def test_what_is_told_in_a_sentence(error, sentence):
    assert sentence_of(error) == sentence
    later = TypeError("while that was handled")
    later.__context__ = error
    assert sentence_of(later) == sentence


def no_memory_of_torch():
    torch.empty(2**55)


def no_memory_of_python():
    b"x" * 2**60


def no_memory_of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity")


def no_memory_in_a_worker():
    text = "-- Process 1 terminated with the following error:\ntorch.OutOfMemoryError: CUDA out of memory. Tried to"
    raise RuntimeError(f"\n\n{text} allocate 20.00 GiB")


@pytest.mark.parametrize("work", [no_memory_of_torch, no_memory_of_python, no_memory_of_a_gpu, no_memory_in_a_worker])
def test_short_memory_is_told_with_what_to_do(work):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        work()
    sentence = sentence_of(raised.value)
    assert sentence.startswith("out of memory (")
    assert "--batch-size" in sentence
    assert "\n" not in sentence
