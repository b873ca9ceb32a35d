import pytest
import torch
from fairseq.data import Dictionary
from helpers import assert_close, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.models.classification.rkm_classifier import (
    RKMClassifier,
    RKMClassifierConfig,
    check_flags,
    has_layer_norm,
)
from fairseq_rkm.modules import POOLINGS

WORDS = Dictionary()
for _i in range(40):
    WORDS.add_symbol(f"w{_i}")


def classifier(dtype=torch.float64, **flags) -> RKMClassifier:
    sizes = {"encoder_embed_dim": 6, "encoder_hidden_size": 8, "classifier_hidden_size": 5, "max_positions": 10}
    cfg = OmegaConf.structured(RKMClassifierConfig(**{**sizes, **flags}))
    check_flags(cfg)
    model = RKMClassifier(cfg, WORDS)
    model.register_classification_head("head", num_classes=3)
    model.to(dtype)
    randomized(model.rkm)
    return model.eval()


def logits(model, tokens):
    return model(src_tokens=tokens, features_only=True, classification_head_name="head")[0]


def batch(documents, width: int, left: bool = False) -> torch.Tensor:
    rows = torch.full((len(documents), width), WORDS.pad())
    for row, document in zip(rows, documents, strict=True):
        row[width - len(document) :] = document if left else row[width - len(document) :]
        if not left:
            row[: len(document)] = document
    return rows


DOCUMENTS = st.lists(st.lists(st.integers(4, 43), max_size=6), min_size=1, max_size=5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
@settings(max_examples=12, deadline=None)
@given(documents=DOCUMENTS, extra=st.integers(0, 4), left=st.booleans(), ngram=st.sampled_from([1, 3]))
def test_neither_padding_nor_the_batch_changes_a_document_s_logits(
    pooling, bidirectional, documents, extra, left, ngram
):
    torch.manual_seed(0)
    model = classifier(pooling=pooling, encoder_bidirectional=bidirectional, ngram=ngram, encoder_layers=2)
    encoded = [torch.tensor([*words, WORDS.eos()]) for words in documents]
    together = logits(model, batch(encoded, max(map(len, encoded)) + extra, left))
    for row, document in enumerate(encoded):
        assert_close(together[row : row + 1], logits(model, document.unsqueeze(0)), f"document {row}")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("flags", [{}, {"no_feedback": True, "ngram": 2, "ngram_padding": "causal"}], ids=str)
def test_every_cell_reads_documents_of_one_token_and_of_none_and_all_its_parameters_learn(cell, flags):
    model = classifier(cell=cell, classifier_hidden_size=50, **flags)
    documents = [torch.tensor([5, 9, 2]), torch.tensor([2]), torch.tensor([], dtype=torch.int64)]
    result = logits(model, batch(documents, 4))
    assert result.isfinite().all()
    (result * torch.tensor([1.0, 2.0, -1.0])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_start_from_the_learned_state(bidirectional):
    model = classifier(learn_initial_state=True, encoder_layers=2, encoder_bidirectional=bidirectional)
    tokens = batch([torch.tensor([4, 5, 6]), torch.tensor([7])], 4)
    wanted = logits(model, tokens)
    wanted.sum().backward()
    starts = [p for name, p in model.named_parameters() if ".initial_" in name]
    assert len(starts) == 4 * (1 + bidirectional)
    for start in starts:
        assert start.grad.ne(0).any()
        start.detach().zero_()
    assert not torch.allclose(logits(model, tokens), wanted)


def test_the_defaults_are_those_of_table_2():
    cfg = OmegaConf.structured(RKMClassifierConfig(max_positions=10))
    model = RKMClassifier(cfg, WORDS)
    model.register_classification_head("head", 4)
    assert model.rkm.num_weights() == 720_000
    assert model.rkm.layer_norm
    assert (model.pooling, model.rkm.ngram_padding) == ("mean", "same")
    assert [type(layer).__name__ for layer in model.classification_heads["head"]] == [
        "Dropout", "Linear", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
    assert model.classification_heads["head"][1].weight.shape == (300, 300)


def test_layer_norm_is_on_unless_a_flag_or_a_configuration_says_otherwise():
    settings_ = [
        ({}, True),
        ({"layer_norm": True}, True),
        ({"layer_norm": False}, False),
        ({"no_layer_norm": True}, False),
        ({"memory_clip": 1.0}, False),
    ]
    for flags, wanted in settings_:
        assert has_layer_norm(RKMClassifierConfig(**flags)) == wanted
        assert classifier(**flags).rkm.layer_norm == wanted


def test_each_dropout_acts_where_its_flag_says():
    tokens = torch.arange(4, 44).view(1, 40)
    for flag in ("dropout", "dropout_input", "dropout_hidden", "dropout_words", "dropout_weights"):
        model = classifier(encoder_layers=2, **{"dropout": 0.0, flag: 0.5})
        assert torch.equal(logits(model, tokens), logits(model, tokens)), "none in evaluation"
        model.train()
        assert not torch.equal(logits(model, tokens), logits(model, tokens)), flag


def test_word_vectors_may_be_frozen(tmp_path, caplog):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("w0 1 2 3 4 5 6\nw7 6 5 4 3 2 1\nunseen 0 0 0 0 0 0\n")
    with caplog.at_level("INFO"):
        model = classifier(encoder_embed_path=str(vectors), encoder_freeze_embed=True)
    assert "2 of the dictionary's 44 types" in caplog.text
    assert model.embed_tokens.weight[WORDS.index("w7")].tolist() == [6, 5, 4, 3, 2, 1]
    assert not model.embed_tokens.weight.requires_grad
    with caplog.at_level("WARNING"):
        classifier(encoder_freeze_embed=True)
    assert "the embeddings stay random" in caplog.text
    with pytest.raises(RKMError, match="line 1: 6 numbers, but the embedding has 7 dimensions"):
        classifier(encoder_embed_path=str(vectors), encoder_embed_dim=7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ngram": 2}, "for --ngram 2 use causal"),
        ({"ngram": 0, "ngram_padding": "causal"}, "ngram must be at least 1, not 0"),
        ({"layer_norm": True, "no_layer_norm": True}, "exclude each other"),
        ({"layer_norm": True, "memory_clip": 1.0}, "memory_clip and layer_norm both bound the memory"),
        ({"encoder_layers": 0}, "--encoder-layers must be at least 1, not 0"),
        ({"classifier_hidden_size": 0}, "--classifier-hidden-size must be at least 1"),
        ({"dropout": 1.0}, r"--dropout must lie within \[0, 1\), not be 1.0"),
        ({"dropout_input": -0.1}, "--dropout-input must lie within"),
        ({"dropout_hidden": 1.5}, "--dropout-hidden must lie within"),
    ],
)
def test_flags_that_cannot_be_had_are_refused_by_name(flags, message):
    with pytest.raises(RKMError, match=message):
        classifier(**flags)
