"""Trained networks as programs: of ``torch.export``, of TorchScript, and in ONNX, run by onnxruntime alone."""

import pytest
import torch
from exported_networks import assert_same
from fairseq.data import Dictionary
from helpers import assert_close, randomized
from omegaconf import OmegaConf
from torch.export import Dim

from fairseq_rkm import RKMError
from fairseq_rkm.models.classification.rkm_classifier import RKMClassifier, RKMClassifierConfig
from fairseq_rkm.models.exporting import ClassifierNetwork, LanguageModelNetwork
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig
from fairseq_rkm.modules import POOLINGS

WORDS = Dictionary()
for _i in range(40):
    WORDS.add_symbol(f"w{_i}")
HEAD = "sentence_classification_head"
STACK = {"ngram": 3, "encoder_bidirectional": True}
MODELS = [
    {"share_decoder_input_output_embed": True, "ngram": 3, "layer_norm": True},
    {"cell": "lstm", "reset_at_eos": True},
    {"adaptive_softmax_cutoff": "10,20", "no_feedback": True, "ngram": [2, 1], "skip_connections": True},
]


def language_model(**flags):
    sizes = {"decoder_embed_dim": 6, "decoder_hidden_size": 8, "criterion_name": None}
    cfg = OmegaConf.structured(RKMLanguageModelConfig(**{**sizes, **flags}))
    model = RKMLanguageModel(RKMLanguageModelDecoder(cfg, WORDS, WORDS))
    for layer in model.decoder.layers:
        randomized(layer)
    return model.eval()


def classifier(**flags):
    sizes = {"encoder_embed_dim": 6, "encoder_hidden_size": 8, "classifier_hidden_size": 5, "max_positions": 10}
    model = RKMClassifier(OmegaConf.structured(RKMClassifierConfig(**{**sizes, **flags})), WORDS)
    model.register_classification_head(HEAD, num_classes=3)
    randomized(model.rkm)
    return model.eval()


def documents(batch, steps):
    """Tokens with padding on the right; one row is all padding."""
    tokens = torch.randint(2, len(WORDS), (batch, steps))
    for row in range(1, batch):
        tokens[row, steps - min(row, steps) :] = WORDS.pad()
    return tokens


def text(network, batch, steps):
    """Tokens and the state of a text that has begun."""
    _, *state = network(documents(batch, 3), *network.start(batch))
    return documents(batch, steps), *(tensor.detach() for tensor in state)


def in_order(shapes):
    """The sizes that may change, as ``torch.export`` takes them."""
    sizes = {"time": Dim.DYNAMIC, "batch": Dim.DYNAMIC}
    named = [{axis: sizes[name] for axis, name in axes.items()} for axes in shapes]
    return named[0], *((tuple(named[1:]),) if named[1:] else ())


def exported(network, inputs, shapes):
    return torch.export.export(network, inputs, dynamic_shapes=in_order(shapes))


def in_onnx(network, inputs, shapes, names, path, dynamo=False):
    """The program of an exporter as a function of tensors; ``dynamo`` is the newer one."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install '.[onnx]')")
    pytest.importorskip("onnxscript", reason="needs onnx and onnxscript (pip install '.[onnx]')")
    sizes = {"dynamic_shapes": in_order(shapes)} if dynamo else {"dynamic_axes": dict(zip(names, shapes, strict=True))}
    torch.onnx.export(network, inputs, path, dynamo=dynamo, input_names=names, **sizes)
    session = onnxruntime.InferenceSession(path)

    def run(*inputs):
        arrays = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("flags", "padding"), zip(MODELS, [True, False, True], strict=True))
def test_a_language_model_s_network_is_a_program_of_any_kind(flags, padding, tmp_path):
    network = LanguageModelNetwork(language_model(**flags), padding)
    example = text(network, 2, 5)
    shapes = [{0: "batch", 1: "time"}, *({1: "batch"} for _ in network.state_names)]
    programs = [torch.jit.trace(network, example), exported(network, example, shapes).module()]
    programs.append(in_onnx(network, example, shapes, ["tokens", *network.state_names], str(tmp_path / "lm.onnx")))
    for batch, steps in [(1, 1), (3, 9), (2, 1), (1, 4)]:
        for program in programs:
            assert_same(program, network, text(network, batch, steps))


@pytest.mark.parametrize("flags", MODELS)
def test_the_network_is_the_model_and_goes_on_word_by_word(flags):
    model = language_model(**flags)
    network, tokens = LanguageModelNetwork(model), torch.randint(2, len(WORDS), (3, 7))
    output, extra = model(tokens)
    wanted = model.get_normalized_probs((output, extra), log_probs=True, sample={"target": None})
    scores, *_ = network(tokens, *network.start(3))
    assert_close(scores.log_softmax(2), wanted)
    state, single = network.start(3), []
    for t in range(7):
        scores, *state = network(tokens[:, t : t + 1], *state)
        single.append(scores)
    assert_close(torch.cat(single, dim=1).log_softmax(2), wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_fairseq_s_own_forward_can_be_exported_whatever_the_example_s_padding(padded):
    model = language_model()
    example = documents(2, 5) if padded else torch.randint(4, len(WORDS), (2, 5))
    program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)).module()
    for batch, steps in [(3, 9), (1, 4)]:
        tokens = documents(batch, steps)
        assert_close(program(tokens)[0], model(tokens)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("pooling", "flags"), zip(POOLINGS, [{}, STACK, STACK], strict=True))
def test_a_classifier_s_network_is_a_program_of_any_kind(pooling, flags, tmp_path):
    network = ClassifierNetwork(classifier(pooling=pooling, **flags))
    shapes, example = [{0: "batch", 1: "time"}], (documents(2, 5),)
    programs = [torch.jit.trace(network, example), exported(network, example, shapes).module()]
    programs.append(in_onnx(network, example, shapes, ["tokens"], str(tmp_path / "classifier.onnx")))
    for batch, steps in [(1, 1), (3, 9), (2, 1), (1, 4)]:
        tokens = documents(batch, steps)
        for program in programs:
            given = program(tokens)
            assert_close(given if torch.is_tensor(given) else given[0], network(tokens))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_newer_exporter_takes_the_networks_too(tmp_path):
    network = LanguageModelNetwork(language_model(**MODELS[0]))
    names, example = ["tokens", *network.state_names], text(network, 2, 5)
    shapes = [{0: "batch", 1: "time"}, *({1: "batch"} for _ in network.state_names)]
    program = in_onnx(network, example, shapes, names, str(tmp_path / "lm.onnx"), dynamo=True)
    documents_network = ClassifierNetwork(classifier(**STACK))
    path = str(tmp_path / "classifier.onnx")
    of_documents = in_onnx(documents_network, (documents(2, 5),), shapes[:1], ["tokens"], path, dynamo=True)
    for batch, steps in [(1, 1), (3, 9)]:
        assert_same(program, network, text(network, batch, steps))
        tokens = documents(batch, steps)
        assert_close(of_documents(tokens)[0], documents_network(tokens))


def test_other_models_are_refused_in_a_sentence():
    with pytest.raises(RKMError, match="takes an rkm_lm"):
        LanguageModelNetwork(classifier())
    with pytest.raises(RKMError, match="takes an rkm_classifier with a head 'other'"):
        ClassifierNetwork(classifier(), "other")
