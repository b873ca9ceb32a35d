from types import SimpleNamespace

import pytest
import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq.search import Sampling
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.tasks import FairseqTask
from helpers import DEVICES, assert_close, product_type, run_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from small_translation import JOINED_SOFTMAX, SOURCE, TARGET, batch, build, dictionary, pad

from fairseq_rkm import CELLS, RKMError, register
from fairseq_rkm.graphs import decoding_graphs
from fairseq_rkm.graphs.decoding_graphs import DecodingGraphs
from fairseq_rkm.graphs.recording import record
from fairseq_rkm.models.translation import rkm_generator
from fairseq_rkm.models.translation.rkm_generator import RKMGenerator, RKMGeneratorWithAlignment
from fairseq_rkm.models.translation.rkm_model import RKMModel

AVAILABLE = DecodingGraphs.available


@pytest.fixture(autouse=True)
def _replayed(monkeypatch):
    """Steps are replayed on a CPU too, where to replay is to do again."""
    monkeypatch.setattr(DecodingGraphs.__init__, "__defaults__", (run_at_once,))
    monkeypatch.setattr(DecodingGraphs, "available", lambda self, _like: not self.refused)


def on(device, model):
    """The model there, with what records on such a device."""
    model.decoder.graphs = DecodingGraphs(record if device == "cuda" else run_at_once)
    return model.to(device)


def generate(kind, models, source, options=None, **given_):
    """What a generator finds."""
    generator = kind(models, models[0].decoder.dictionary, **{"max_len_b": 12, **(options or {})})
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(SOURCE.pad()).sum(1)}}
    return generator.generate(models, sample, **given_)


def assert_same(given_, wanted):
    assert [len(hypotheses) for hypotheses in given_] == [len(hypotheses) for hypotheses in wanted]
    for pair in zip(given_, wanted, strict=True):
        for mine, fairseq_s in zip(*pair, strict=True):
            assert mine.keys() == fairseq_s.keys()
            assert mine.pop("tokens").tolist() == fairseq_s["tokens"].tolist()
            for name, value in mine.items():
                assert (value.device, value.dtype) == (fairseq_s[name].device, fairseq_s[name].dtype), name
                assert_close(value, fairseq_s[name], name)


def both(models, source, options=None, **given_):
    """What both generators find, which is to be the same, and whether steps were replayed for it."""
    wanted = generate(SequenceGenerator, models, source, options, **given_)
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        search = RKMGenerator._search
        patch.setattr(RKMGenerator, "_search", lambda *args: calls.append(1) or search(*args))
        assert_same(generate(RKMGenerator, models, source, options, **given_), wanted)
    return wanted, bool(calls)


FLAGS = [
    {}, {"input_feeding": True}, {"layer_norm": True, "attention_layer": 0}, JOINED_SOFTMAX,
    {"encoder_bidirectional": True, "decoder_layers": 1, "attention_layer": 0},
]  # fmt: skip


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    cell=st.sampled_from(sorted(CELLS)),
    ngram=st.integers(1, 3),
    flags=st.sampled_from(FLAGS),
    sharpness=st.sampled_from([1.0, 4.0, 20.0]),
    options=st.fixed_dictionaries(
        {
            "beam_size": st.integers(1, 6), "max_len_a": st.sampled_from([0, 0.7]), "max_len_b": st.integers(4, 14),
            "max_len": st.sampled_from([0, 6]), "min_len": st.integers(1, 4),
            "len_penalty": st.sampled_from([1, 0.5, 2.0]), "unk_penalty": st.sampled_from([0.0, 1.5, -2.0]),
            "temperature": st.sampled_from([1.0, 0.6]), "normalize_scores": st.booleans(),
        }
    ),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_hypotheses_are_fairseq_s(cell, ngram, flags, sharpness, options, seed):
    torch.manual_seed(seed)
    model = build(**{"cell": cell, "ngram": ngram, "decoder_layers": 2, "attention_layer": 1, **flags})
    model.decoder.output_projection.weight.data.mul_(sharpness)
    sentences = [torch.cat([torch.randint(4, 34, (1, n)), torch.tensor([[SOURCE.eos()]])], dim=1) for n in (5, 1, 3)]
    source = torch.cat([pad(sentence, 6 - sentence.size(1), "left") for sentence in sentences])
    assert both([model], source, options)[1]
    assert model.decoder.graphs.recorded


@pytest.mark.parametrize("device", DEVICES)
def test_generators_and_models_that_change_have_hypotheses_of_their_own(device):
    """One model's graphs serve any batch and options, and weights as they become."""
    torch.manual_seed(1)
    model = on(device, build(ngram=2, decoder_layers=2))
    model.decoder.output_projection.bias.data[TARGET.eos()] = 1.0
    found = []
    for options in ({}, {"beam_size": 3}, {"min_len": 6}, {"temperature": 0.5}, {"unk_penalty": -30.0}, {"eos": 7}):
        torch.manual_seed(0)
        for rows in (4, 2, 7):
            wanted, replayed = both([model], batch(rows)[0].to(device), {"beam_size": 4, **options})
            assert replayed
        found.append(tuple(hypothesis["score"].item() for hypothesis in wanted[0]))
    assert len(set(found)) == 6, "options make a difference"
    for parameter in model.parameters():
        parameter.data.mul_(1.2)
    assert both([model], batch(7)[0].to(device), {"beam_size": 4})[1]


@pytest.mark.parametrize("device", DEVICES)
def test_a_first_word_of_the_user_s(device):
    model = on(device, build())
    source = batch()[0].to(device)
    found, usual = (both([model], source, **given_) for given_ in ({"bos_token": 7}, {}))
    assert found[1]
    assert found[0][0][0]["score"] != usual[0][0][0]["score"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_in_the_precisions_of_a_gpu(dtype):
    """Near ties may fall otherwise than in fairseq's batches, which shrink: scores are compared, of the best."""
    torch.manual_seed(0)
    model = on("cuda", build(ngram=2, decoder_layers=2, layer_norm=True)).to(dtype)
    model.decoder.output_projection.weight.data.mul_(4)
    source = batch(9)[0].cuda()
    found = [generate(kind, [model], source, {"beam_size": 4}) for kind in (RKMGenerator, SequenceGenerator)]
    given_, wanted = (torch.stack([hypotheses[0]["score"] for hypotheses in each]) for each in found)
    assert_close(given_, wanted, dtype=product_type(dtype, "cuda"))
    assert model.decoder.graphs.recorded


def test_it_ends_soon_after_the_last_sentence_has(monkeypatch):
    model = build(decoder_layers=2)
    model.decoder.output_projection.bias.data[TARGET.eos()] = 20.0
    steps, step = [], RKMGenerator._step
    monkeypatch.setattr(RKMGenerator, "_step", lambda *given_: steps.append(1) or step(*given_))
    found = generate(RKMGenerator, [model], batch()[0], {"max_len_b": 40, "beam_size": 3})
    longest = max(len(hypothesis["tokens"]) for hypotheses in found for hypothesis in hypotheses)
    assert longest < 10
    # One more than are taken, when the step is recorded.
    assert longest <= len(steps) - 1 < longest + rkm_generator.ASKING_STEPS


def test_steps_that_cannot_be_recorded_are_done(monkeypatch):
    def refuse(_run, _pool):
        raise RKMError("no")

    monkeypatch.setattr(DecodingGraphs.__init__, "__defaults__", (refuse,))
    model, source = build(), batch()[0]
    given_ = generate(RKMGenerator, [model], source)
    assert model.decoder.graphs.refused
    wanted, replayed = both([model], source)
    assert_same(given_, wanted)
    assert not replayed, "from then on fairseq's generator searches"


def test_large_batches_are_searched_without_graphs(monkeypatch):
    monkeypatch.setattr(decoding_graphs, "MOST_ELEMENTS", 10)
    model = build()
    assert both([model], batch()[0])[1]
    assert not model.decoder.graphs.recorded


PREFIX = torch.tensor([[5, 6], [7, 1], [8, 9]])


@pytest.mark.parametrize(
    ("options", "given_"),
    [
        ({}, {"prefix_tokens": PREFIX}),
        ({"no_repeat_ngram_size": 2}, {}),
        ({"tokens_to_suppress": ["w3"]}, {}),
        ({"beam_size": 30}, {}),
        ({"match_source_len": True}, {}),
        ({"search_strategy": Sampling(TARGET, sampling_topk=1)}, {}),
    ],
)
def test_what_is_not_plain_beam_search_is_fairseq_s(options, given_):
    assert not both([build()], batch()[0], options, **given_)[1]


class Unigrams(torch.nn.Module):
    """A language model of which fairseq's generator adds the scores."""

    def forward(self, tokens):
        return torch.linspace(0, 5, len(TARGET)).expand(*tokens.shape, -1)

    def get_normalized_probs(self, scores, log_probs, sample):
        return scores.log_softmax(dim=-1)


def test_a_language_model_s_scores_and_what_cannot_be_are_fairseq_s():
    model, source = build(), batch()[0]
    assert not both([model], source, {"lm_model": Unigrams()})[1]
    with pytest.raises(AssertionError, match="min_len cannot be larger than max_len"):
        generate(RKMGenerator, [model], source, {"min_len": 13})
    with pytest.raises(NotImplementedError, match="constraints"):
        generate(RKMGenerator, [model], source, constraints=torch.ones(3, 4, dtype=torch.int64))


def test_what_is_not_one_rkm_with_its_softmax_is_fairseq_s(monkeypatch):
    source = batch()[0]
    assert not both([build(), build(cell="ran")], source)[1], "an ensemble"
    assert not both([build(adaptive_softmax_cutoff="10,20", adaptive_softmax_factor=2)], source)[1]
    assert not both([build(target=dictionary(3))], source, {"beam_size": 5})[1], "fewer candidates than usual"
    drawing = build(dropout=0.5)
    drawing.decoder.dropout_out.apply_during_inference = True
    monkeypatch.setattr(RKMGenerator, "_search", None)
    assert generate(RKMGenerator, [drawing], source)
    monkeypatch.setattr(DecodingGraphs, "available", AVAILABLE)
    assert generate(RKMGenerator, [build()], source), "on a CPU"


@pytest.mark.parametrize("words", [1, 3])
def test_fewer_words_than_beams(words):
    """Some beams continue nothing, and a sentence may have fewer hypotheses than beams."""
    model = build()
    bias = model.decoder.output_projection.bias.data
    bias.fill_(-torch.inf)
    bias[[TARGET.eos(), *range(10, 10 + words)]] = 0.0
    found, replayed = both([model], batch()[0], {"beam_size": 6, "max_len_b": 2})
    assert replayed
    assert len(found[0]) == {1: 2, 3: 6}[words]


def test_no_hypothesis_without_a_probability():
    model = build()
    model.decoder.output_projection.weight.data.fill_(torch.nan)
    generator = RKMGenerator([model], TARGET, beam_size=2)
    beams = generator._begin(torch.zeros(3, 6), 12, TARGET.eos())
    features = torch.randn(6, 1, model.decoder.output_projection.in_features, dtype=torch.float64)
    with torch.no_grad():
        assert generator._log_probabilities(features, beams).eq(-torch.inf).all()
    with pytest.raises(RKMError, match=r"no translation of sentence 0 of a batch has a probability: .* not finite"):
        generate(RKMGenerator, [model], batch()[0])


@pytest.mark.parametrize(
    ("flags", "kind", "fairseq_s"),
    [
        ({}, RKMGenerator, SequenceGenerator),
        ({"print_alignment": "hard"}, RKMGeneratorWithAlignment, SequenceGeneratorWithAlignment),
        ({"print_alignment": "soft"}, RKMGeneratorWithAlignment, SequenceGeneratorWithAlignment),
        ({"replace_unk": "@@ "}, RKMGeneratorWithAlignment, SequenceGeneratorWithAlignment),
    ],
)
def test_fairseq_s_tasks_search_with_it(flags, kind, fairseq_s):
    register()
    task, model = SimpleNamespace(target_dictionary=TARGET), build()
    source = torch.cat([batch()[0], torch.full((3, 1), SOURCE.eos())], dim=1)
    sample = {"net_input": {"src_tokens": source, "src_lengths": source.ne(SOURCE.pad()).sum(1)}}
    sample["net_input"]["prev_output_tokens"] = batch()[1]
    found = []
    for classes in (None, RKMModel.generator_classes):
        model.generator_classes = classes
        generator = FairseqTask.build_generator(task, [model], GenerationConfig(beam=4, max_len_b=12, **flags))
        assert type(generator) is (kind if classes else fairseq_s)
        found.append(generator.generate([model], sample))
    for wanted, mine in zip(*([h for hypotheses in each for h in hypotheses] for each in found), strict=True):
        assert str(mine["alignment"]) == str(wanted["alignment"])
        assert len(wanted["alignment"]) > 0 or not flags
    asked = {"seq_gen_cls": SequenceGenerator, "extra_gen_cls_kwargs": {"max_len": 3}}
    assert type(FairseqTask.build_generator(task, [model], GenerationConfig(), **asked)) is SequenceGenerator
    del asked["seq_gen_cls"]
    assert FairseqTask.build_generator(task, [model], GenerationConfig(), **asked).max_len == 3
