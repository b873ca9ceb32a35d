from argparse import SUPPRESS, ArgumentParser
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from fairseq_rkm.models.language_model import language_model_presets as presets
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder


def shape(config, types, **flags):
    """The network's shape alone, without memory for its weights."""
    dictionary = Dictionary()
    for i in range(types - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    with torch.device("meta"):
        return RKMLanguageModelDecoder(
            OmegaConf.structured(config(criterion_name=None, **flags)), dictionary, dictionary
        )


@pytest.mark.parametrize(
    ("config", "types", "parameters"),
    [(presets.PTBConfig, 10_000, 24_221_600), (presets.WikiText2Config, 33_278, 33_556_078)],
)
def test_the_lstm_has_the_published_number_of_parameters(config, types, parameters):
    """Except that ``nn.LSTM`` has two biases a gate, of which only the sum matters."""
    built = shape(config, types, cell="lstm")
    second_biases = sum(len(layer.bias_l0) for layer in built.layers)
    assert sum(p.numel() for p in built.parameters()) + second_biases == parameters
    assert [layer.hidden_size for layer in built.layers] == [1150, 1150, 400]


def test_wikitext103_s_shape():
    built = shape(presets.WikiText103Config, 267_735)
    assert [layer.hidden_size for layer in built.layers] == [2500] * 4
    assert built.adaptive_softmax.cutoff == [2800, 20000, 76000, 267_735]


def test_the_dropouts_and_the_fast_presets():
    ptb, wikitext2 = presets.PTBConfig(), presets.WikiText2Config()
    assert (ptb.dropout, ptb.dropout_hidden, ptb.dropout_input) == (0.4, 0.25, 0.4)
    assert (wikitext2.dropout, wikitext2.dropout_hidden, wikitext2.dropout_input) == (0.4, 0.2, 0.65)
    assert (
        (wikitext2.dropout_words, wikitext2.dropout_weights) == (ptb.dropout_words, ptb.dropout_weights) == (0.1, 0.5)
    )
    for fast, slow in ((presets.PTBFastConfig(), ptb), (presets.WikiText2FastConfig(), wikitext2)):
        assert (fast.decoder_hidden_size, fast.decoder_layers) == (slow.decoder_hidden_size, slow.decoder_layers)


def test_the_mixture_has_as_many_weights_as_one_softmax():
    built = shape(presets.PTBMixtureFastConfig, 10_000, cell="rkm_lstm")
    assert [layer.hidden_size for layer in built.layers] == [900, 900, 900]
    assert built.output_projection.weight is built.embed_tokens.weight
    assert built.mixture.latent.out_features == 15 * 280
    assert sum(p.numel() for p in built.parameters()) == 23_826_500


@pytest.mark.parametrize("config", [presets.PTBNoFeedbackFastConfig, presets.WikiText2NoFeedbackFastConfig])
def test_without_feedback_there_are_the_qrnn_s_weights(config):
    """Three gates of four layers, 400-1550-1550-1550-400, that see 2, 1, 1 and 1 inputs: 20 million."""
    built = shape(config, 10_000)
    assert [(layer.ngram, layer.hidden_size, len(layer.gates)) for layer in built.layers] == [
        (2, 1550, 3), (1, 1550, 3), (1, 1550, 3), (1, 400, 3),
    ]  # fmt: skip
    assert not [name for name, _ in built.layers.named_parameters() if "weight_hh" in name]
    weights = [p for name, p in built.layers.named_parameters() if "weight" in name]
    assert sum(map(torch.numel, weights)) == sum(layer.num_weights() for layer in built.layers) == 19_995_000
    assert 3 * (2 * 400 * 1550 + 2 * 1550 * 1550 + 1550 * 400) == 19_995_000


NAMES = sorted(name for name in ARCH_MODEL_REGISTRY if name.startswith("rkm_lm_"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_takes_the_flags_of_rkm_lm_with_their_meaning(name):
    parser = ArgumentParser()
    ARCH_MODEL_REGISTRY[name].add_args(parser.add_argument_group("model", argument_default=SUPPRESS))
    flags = ["--share-decoder-input-output-embed", "--uniform-forget-bias", "--dropout", "0.3"]
    given = vars(parser.parse_args(flags))
    assert given["share_decoder_input_output_embed"] is given["uniform_forget_bias"] is True
    assert given["dropout"] == 0.3
    assert not vars(parser.parse_args([])), "the preset's own defaults stay"


def test_the_initial_biases_are_awd_lstm_s():
    dictionary = Dictionary()
    cfg = OmegaConf.structured(
        presets.PTBConfig(criterion_name=None, decoder_hidden_size=100, decoder_embed_dim=64, cell="lstm")
    )
    built = RKMLanguageModelDecoder(cfg, dictionary, dictionary)
    for layer in built.layers:
        bound = layer.hidden_size**-0.5
        for weight in (layer.bias_l0, layer.weight_ih_l0, layer.weight_hh_l0):
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
            assert weight.mean().abs() < 0.15 * bound
    assert built.output_projection.bias.eq(0).all()
    assert built.embed_tokens.weight.abs().max() <= 0.1


@pytest.mark.parametrize(
    ("flags", "clip"),
    [
        ({"cell": "rkm_lstm"}, 1.0),
        ({"cell": "linear_kernel_gated"}, 1.0),
        ({"cell": "linear_kernel"}, None),
        ({"cell": "rkm_cifg", "memory_clip": "2.0"}, 2.0),
        ({"cell": "rkm_lstm", "memory_clip": "none"}, None),
        ({"cell": "rkm_lstm", "layer_norm": True}, None),
        ({"cell": "rkm_lstm", "no_feedback": True}, None),
        ({"cell": "gated_cnn"}, None),
        ({"cell": "lstm"}, None),
    ],
)
def test_a_memory_that_nothing_else_bounds_is_clipped(flags, clip):
    dictionary = Dictionary()
    small = {"decoder_embed_dim": 4, "decoder_hidden_size": 4, "decoder_layers": 1, "criterion_name": None}
    cfg = OmegaConf.structured(presets.PTBConfig(**small, **flags))
    given = cfg.memory_clip
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, output_dictionary=dictionary)
    model = presets.PTBLanguageModel.build_model(cfg, task)
    assert model.decoder.layers[0].memory_clip == clip
    assert cfg.memory_clip == given, "the flags remain as they were given"
