from types import SimpleNamespace

import pytest
import torch
from fairseq.tasks.masked_lm import MaskedLMTask
from helpers import assert_close, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn import functional as F

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.data.signals import SignalPreparation
from fairseq_rkm.models.signals.rkm_signal_classifier import (
    SIGNAL_POOLINGS,
    RKMSignalClassifier,
    RKMSignalClassifierConfig,
)

SIGNALS = SignalPreparation(["a", "b", "c"], ["Cz", "Pz"], [0.5, -1.0], [2.0, 3.0], rate=125.0)


def build(preparation=SIGNALS, **flags) -> RKMSignalClassifier:
    sizes = {"encoder_hidden_size": 6, "classifier_hidden_size": 5, "ngram": 4}
    cfg = OmegaConf.structured(RKMSignalClassifierConfig(**{**sizes, **flags}))
    return RKMSignalClassifier.build_model(cfg, SimpleNamespace(preparation=preparation))


def classifier(dtype=torch.float64, **flags) -> RKMSignalClassifier:
    model = build(**flags)
    model.register_classification_head("head", num_classes=3)
    model.to(dtype)
    randomized(model.rkm)
    return model.eval()


def logits(model, source, mask=None):
    return model(source, mask, features_only=True, classification_head_name="head")[0]


@pytest.mark.parametrize("pooling", SIGNAL_POOLINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), extra=st.integers(0, 4), left=st.booleans(),
    ngram=st.sampled_from([1, 3, 4, 40]), padding=st.sampled_from(["same", "causal"]),
)  # fmt: skip
def test_neither_padding_nor_the_batch_changes_a_window_s_logits(
    pooling, bidirectional, lengths, extra, left, ngram, padding
):
    torch.manual_seed(0)
    model = classifier(
        pooling=pooling,
        pooling_parts=1 if pooling == "last" else 1 + bidirectional,
        encoder_bidirectional=bidirectional,
        ngram=ngram,
        ngram_padding=padding,
        encoder_layers=2,
    )
    windows = [torch.randn(length, 2, dtype=torch.float64) for length in lengths]
    width = max(lengths) + extra
    source = torch.full((len(windows), width, 2), 1e3, dtype=torch.float64)
    mask = torch.ones(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        place = slice(width - len(window), width) if left else slice(len(window))
        source[row, place], mask[row, place] = window, False
    together = logits(model, source, mask)
    for row, window in enumerate(windows):
        assert_close(together[row : row + 1], logits(model, window.unsqueeze(0)), f"window {row}")


@pytest.mark.parametrize("ngram", [1, 2, 3, 5, 40, 41, 80])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_same_n_grams_are_a_written_out_convolution_at_the_edges_too(ngram, steps):
    model = classifier(cell="cnn", ngram=ngram, encoder_bidirectional=True)
    x = torch.randn(3, steps, 2, dtype=torch.float64)
    output, _ = model.rkm(x.transpose(0, 1))

    def convolved(weight, bias, signal):
        """``nn.Conv1d(padding="same")``; a window's columns go from its newest sample to its oldest."""
        kernel = weight.view(6, ngram, 2).flip(1).transpose(1, 2)
        return torch.tanh(0.5 * F.conv1d(signal.transpose(1, 2), kernel, bias, padding="same")).permute(2, 0, 1)

    rkm = model.rkm
    assert_close(output[..., :6], convolved(rkm.weight_ih_l0, rkm.bias_l0, x), "forward")
    backward = convolved(rkm.weight_ih_l0_reverse, rkm.bias_l0_reverse, x.flip(1)).flip(0)
    assert_close(output[..., 6:], backward, "backward")
    assert model.filters().shape == (1, 6, 2, ngram)
    if steps > 1 and ngram > 1:
        by_hand = x[0, 0] @ model.filters()[0, :, :, (ngram - 1) // 2].t()
        for step in range(1, min(steps, ngram // 2 + 1)):
            by_hand += x[0, step] @ model.filters()[0, :, :, (ngram - 1) // 2 + step].t()
        assert_close(output[0, 0, :6], torch.tanh(0.5 * (by_hand + rkm.bias_l0)), "the first step, by hand")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("flags", [{}, {"no_feedback": True}, {"pooling": "attention", "layer_norm": True}], ids=str)
def test_every_cell_reads_windows_of_one_step_and_of_many_and_all_its_parameters_learn(cell, flags):
    if cell in {"cnn", "gated_cnn"} and flags.get("no_feedback"):
        flags = {}
    model = classifier(cell=cell, classifier_hidden_size=50, **flags)
    mask = torch.arange(9) >= torch.tensor([[9], [1], [5]])
    result = logits(model, torch.randn(3, 9, 2), mask)
    assert result.isfinite().all()
    (result * torch.tensor([1.0, 2.0, -1.0])).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.ne(0).any(), name


def test_attention_is_a_mean_that_learns_and_a_window_of_padding_alone_is_zero():
    model = classifier(pooling="attention")
    source, mask = torch.randn(2, 6, 2), torch.arange(6) >= torch.tensor([[6], [0]])
    output = model.rkm(source.double().transpose(0, 1), padding_mask=mask)[0]
    scores = (output[:, 0] @ model.attention.score.weight[0]).softmax(0)
    pooled = model.extract_features(source, mask)
    assert_close(pooled[0], (scores.unsqueeze(1) * output[:, 0]).sum(0), "by hand")
    assert pooled[1].eq(0).all()


def test_each_disturbance_acts_in_training_alone():
    x = torch.randn(4, 50, 2, dtype=torch.float64)
    for flag, value in (
        ("dropout", 0.5), ("dropout_hidden", 0.5), ("dropout_weights", 0.5), ("dropout_channels", 0.5), ("noise", 0.1),
        ("time_masks", 3),
    ):  # fmt: skip
        model = classifier(encoder_layers=2, **{"dropout": 0.0, flag: value})
        assert torch.equal(logits(model, x), logits(model, x)), "none in evaluation"
        model.train()
        assert not torch.equal(logits(model, x), logits(model, x)), flag


def test_disturbances_are_what_their_names_say():
    model = build(noise=0.5, dropout_channels=0.0).train()
    x = torch.zeros(400, 300, 2)
    assert model.augmentation(x).std().item() == pytest.approx(0.5, rel=0.02)
    model = build(dropout_channels=0.25).train()
    lost = model.augmentation(torch.ones(7, 4000, 2))
    assert lost.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(lost, lost[:1].expand_as(lost)), "one mask for all steps"
    assert (lost[0] == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    model = build(time_masks=1, time_mask_steps=10).train()
    masked = model.augmentation(torch.ones(50, 3000, 2)).eq(0)
    assert torch.equal(masked[..., 0], masked[..., 1]), "all channels at once"
    lengths = masked[..., 0].sum(0)
    assert (lengths.min(), lengths.max()) == (0, 10)
    rises = (masked[1:, :, 0] & ~masked[:-1, :, 0]).sum(0) + masked[0, :, 0]
    assert rises.max() == 1, "one stretch"
    assert masked[0].any()
    assert masked[-1].any()
    assert masked.double().mean((1, 2)).std() < 0.02, "all steps alike"
    assert model.augmentation(torch.ones(1, 3, 2)).shape == (1, 3, 2)


def test_no_hidden_layer_and_no_class_more_than_the_data():
    model = build(classifier_hidden_size=0)
    model.register_classification_head("head", num_classes=3)
    assert [type(layer).__name__ for layer in model.classification_heads["head"]] == ["Dropout", "Linear"]
    assert model.classification_heads["head"][1].weight.shape == (3, 6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ngram": 0}, "ngram must be at least 1, not 0"),
        ({"layer_norm": True, "memory_clip": "1"}, "memory_clip and layer_norm both bound the memory"),
        ({"encoder_layers": 0}, "--encoder-layers must be at least 1, not 0"),
        ({"classifier_hidden_size": -1}, "--classifier-hidden-size must be at least 0"),
        ({"dropout": 1.0}, r"--dropout must lie within \[0, 1\), not be 1.0"),
        ({"dropout_channels": 1.0}, "--dropout-channels must lie within"),
        ({"noise": -1.0}, "--noise must be at least 0"),
        ({"noise": float("nan")}, "--noise must be at least 0"),
        ({"time_masks": -1}, "--time-masks must be at least 0"),
        ({"time_mask_steps": 0}, "--time-mask-steps must be at least 1"),
    ],
)
def test_flags_that_cannot_be_had_are_refused_by_name(flags, message):
    with pytest.raises(RKMError, match=message):
        classifier(**flags)


def test_a_task_without_signals_is_refused():
    cfg = OmegaConf.structured(RKMSignalClassifierConfig())
    with pytest.raises(RKMError, match="--arch rkm_signal_classifier goes with --task signal_classification"):
        RKMSignalClassifier.build_model(cfg, MaskedLMTask.__new__(MaskedLMTask))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.0] * 3, "deviation": [1.0] * 3, "channels": None}, "trained on 2 channels, and the data have 3"),
        ({"rate": 250.0}, "trained at 125 samples a second, and the data have 250"),
        ({"mean": [0.5, -1.0000000001]}, "trained on signals of other means and scales"),
        ({"classes": ["a", "b"]}, "has 3 outputs, and the data ask for 2: were there other classes?"),
    ],
)
def test_a_checkpoint_of_other_signals_is_refused(changes, message):
    trained = classifier(torch.bfloat16)
    other = build(SignalPreparation(**{**vars(SIGNALS), **changes}))
    other.register_classification_head("head", num_classes=len(changes.get("classes", "abc")))
    with pytest.raises(RKMError, match=message):
        other.load_state_dict(trained.state_dict(), strict=True)
    again = classifier()
    again.load_state_dict(trained.state_dict(), strict=True)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "power"])
def test_parts_of_a_window_are_pooled_each_by_itself(pooling):
    torch.manual_seed(0)
    model, whole = (classifier(pooling=pooling, pooling_parts=parts, ngram=1, cell="cnn") for parts in (3, 1))
    whole.load_state_dict({**whole.state_dict(), **{k: v for k, v in model.state_dict().items() if "head" not in k}})
    source = torch.randn(2, 14, 2, dtype=torch.float64)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[1, :5] = True
    found = model.extract_features(source, mask)
    assert found.shape == (2, 18)
    cuts = ([0, 5, 10, 14], [5, 8, 11, 14])
    for row, cut in enumerate(cuts):
        for part in range(3):
            alone = whole.extract_features(source[row : row + 1, cut[part] : cut[part + 1]])
            assert_close(found[row, 6 * part : 6 * part + 6], alone[0], f"window {row}, part {part}")


def test_windows_of_fewer_steps_than_parts_and_the_last_state_s_parts():
    model = classifier(pooling_parts=4)
    assert model.extract_features(torch.randn(1, 2, 2, dtype=torch.float64)).isfinite().all()
    with pytest.raises(RKMError, match="--pooling last takes the last state alone"):
        build(pooling="last", pooling_parts=2)
