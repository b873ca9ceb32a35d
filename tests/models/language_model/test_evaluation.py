"""The temperature, the cache and dynamic evaluation of a decoder that scores a stream."""

import copy

import pytest
import torch
from fairseq.data import Dictionary
from helpers import assert_close, randomized
from omegaconf import OmegaConf
from torch.nn import functional as F

from fairseq_rkm import RKMError
from fairseq_rkm.data.token_stream import StreamSegments, TokenStream
from fairseq_rkm.graphs.recording import record
from fairseq_rkm.models.language_model import stream_learner
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModelConfig
from fairseq_rkm.models.language_model.stream_learner import CheckedBatches, StreamLearner
from fairseq_rkm.modules import dynamic_evaluation
from fairseq_rkm.modules.continuous_cache import ContinuousCache

RATE, DECAY, EPSILON = 0.01, 0.3, 2e-5
NUMBERS = (RATE, DECAY, EPSILON)


@pytest.fixture(scope="module")
def dictionary():
    words = Dictionary()
    for i in range(8):
        words.add_symbol(f"w{i}")
    return words


def decoder(dictionary, **flags):
    sizes = {"decoder_embed_dim": 5, "decoder_hidden_size": 6, "criterion_name": None, "dropout": 0.5, **flags}
    built = RKMLanguageModelDecoder(OmegaConf.structured(RKMLanguageModelConfig(**sizes)), dictionary, dictionary)
    for layer in built.double().layers:
        randomized(layer)
    return built.eval()


def segments(tokens: int, streams: int, length: int) -> list[dict]:
    stream = TokenStream(torch.randint(4, 12, (tokens,)), 2, "text")
    cut = StreamSegments(stream, streams, (0, streams), length, pad=1)
    return [cut[index] for index in range(len(cut))]


@torch.no_grad()
def scores(model, text) -> list[torch.Tensor]:
    """Log probabilities, as fairseq-eval-lm's scorer takes them."""
    passes = (model(batch["net_input"]["src_tokens"], segment=i) for i, batch in enumerate(text))
    return [model.get_normalized_probs(output, log_probs=True) for output in passes]


def by_hand(model, training, text):
    """Score, then learn with the segment's own targets: a plain loop over the paper's update."""
    weights, ends = list(model.parameters()), []
    trained = [weight.detach().clone() for weight in weights]

    def loss(batch, states, following=None):
        tokens, target = batch["net_input"]["src_tokens"], batch["target"]
        outputs, states = model.run(tokens, states, None, model.resets(tokens))
        logs = F.log_softmax(model.output_layer(outputs.transpose(0, 1)), -1)
        real = target != 1
        if following is not None:  # a stream that ends here does not see its last target as an input
            real[:, -1] &= following["net_input"]["src_tokens"][:, 0] != 1
        picked = logs.gather(2, target.unsqueeze(2)).squeeze(2)[real]
        return -picked.mean(), [state.detach() for state in states], logs.detach()

    squares, states = [0.0 for _ in weights], None
    for batch in training:
        value, states, _ = loss(batch, states)
        gradients = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        squares = [s + g**2 / len(training) for s, g in zip(squares, gradients, strict=True)]
    roots = [square.sqrt() for square in squares]
    mean = torch.cat([root.flatten() for root in roots]).mean()
    states = None
    for batch, following in zip(text, [*text[1:], None], strict=True):
        value, states, logs = loss(batch, states, following)
        ends.append(logs)
        gradients = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for weight, start, root, gradient in zip(weights, trained, roots, gradients, strict=True):
                pull = (DECAY * root / mean).clamp(max=1)
                weight.add_(pull * (start - weight) - RATE * gradient / (root + EPSILON))
    return ends


def again(run, _pool):
    """What stands in for a graph on a CPU: to replay is to run again, from the same tensors to the same tensors."""
    return run


def refused(_run, _pool):
    raise RKMError("a CUDA graph could not be recorded")


def shapes(recordings) -> list[tuple[int, ...]]:
    return sorted(tuple(shape) for shape in recordings)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softmaxes", [1, 2])
@pytest.mark.parametrize("graphs", [record, again, refused])
def test_dynamic_evaluation_is_a_plain_loop_and_begins_each_text_anew(
    dictionary, streams, tied, softmaxes, graphs, caplog
):
    """Streams of unlike lengths, whose last segment has padding, included."""
    flags = {"share_decoder_input_output_embed": tied, "ngram": 2, "softmaxes": softmaxes}
    reset = tied and graphs is record
    model = decoder(dictionary, **flags, reset_at_eos=reset, learn_initial_state=tied and not reset)
    training, text = segments(90, 4, 5), segments(20 * streams + 1, streams, 4)
    expected = by_hand(copy.deepcopy(model), training, text)
    model.use_learner(StreamLearner(model, NUMBERS, lambda: training, graphs))
    for _ in range(2):
        found = scores(model, text)
        assert len(found) == len(expected) > 4
        for one, other in zip(found, expected, strict=True):
            assert not one.requires_grad
            assert_close(one, other)
    passes = model.learner.passes
    assert shapes(passes.measuring) == ([(4, 5)] if graphs is again else [])
    # Streams of 20 tokens are five segments of 4, and the first stream has one token more. It comes alone, and is not
    # learned: a graph would hold kernels that have never run.
    assert shapes(passes.scoring) == ([(streams, 4)] if graphs is again else [])
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["a CUDA graph could not be recorded: dynamic evaluation goes on without"] * (graphs is refused)
    assert (found[-1] - scores(decoder_without_learner(model), text)[-1]).abs().max() > 1e-3


def decoder_without_learner(model):
    model.learner.passes.dynamic.forget()
    model.learner = None
    return model


def test_a_segment_scored_twice_is_learned_once(dictionary):
    """It starts twice from the same state, with a graph and without."""
    model, text = decoder(dictionary, ngram=2), segments(50, 2, 4)
    expected = by_hand(copy.deepcopy(model), text, text)
    model.use_learner(StreamLearner(model, NUMBERS, lambda: text, again))
    scores(model, text)
    for number, batch in enumerate(text):
        for _ in range(1 + number % 3):
            with torch.no_grad():
                logits, _ = model(batch["net_input"]["src_tokens"], segment=number)
            assert_close(F.log_softmax(logits, -1), expected[number])


def test_modules_with_hooks_are_called_and_not_replayed(dictionary, monkeypatch):
    model, text, called = decoder(dictionary), segments(50, 1, 4), []
    model.use_learner(StreamLearner(model, NUMBERS, lambda: text, again))
    scores(model, text)
    assert shapes(model.learner.passes.scoring) == [(1, 4)]
    model.layers[0].register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setattr(model.learner.passes.scoring, "find", None)
    scores(model, text)
    assert len(called) == len(text)


def test_scores_outlast_the_next_replay(dictionary):
    model, text = decoder(dictionary), segments(50, 1, 4)
    model.use_learner(StreamLearner(model, NUMBERS, lambda: text, again))
    scores(model, text)
    with torch.no_grad():
        kept = [model(batch["net_input"]["src_tokens"], segment=i) for i, batch in enumerate(text)]
    copies = [(logits.clone(), extra["features"].clone()) for logits, extra in kept]
    scores(model, text)
    for (logits, extra), (as_given, features) in zip(kept, copies, strict=True):
        assert torch.equal(logits, as_given)
        assert torch.equal(extra["features"], features)
    assert not torch.equal(kept[3][0], kept[4][0])


@pytest.mark.parametrize("graphs", [record, again])
def test_diverged_learning_is_told_before_the_scores_are_used(dictionary, graphs, monkeypatch):
    """At once on a CPU. Where looks are rare, it is told after the last segment, and before another text begins."""
    model, text = decoder(dictionary), segments(50, 1, 4)
    batches = [batch["net_input"]["src_tokens"] for batch in text]
    monkeypatch.setattr(dynamic_evaluation, "DIVERGED", 1e-3)

    def evaluated(stop):
        learner = StreamLearner(model, NUMBERS, lambda: text, graphs)
        model.use_learner(learner)
        for number, tokens in enumerate(CheckedBatches(batches[:stop], learner)):
            model(tokens, segment=number)

    evaluated(1)  # nothing has been learned yet
    with pytest.raises(RKMError, match="has diverged: lower --dynamic-lr"):
        evaluated(2)
    monkeypatch.setattr(stream_learner, "is_near", lambda _device: False)
    model.use_learner(StreamLearner(model, NUMBERS, lambda: text, graphs))
    scores(model, text)
    with pytest.raises(RKMError, match="has diverged: lower --dynamic-lr"):
        scores(model, text)
    with pytest.raises(RKMError, match="has diverged: lower --dynamic-lr"):
        evaluated(len(text))
    monkeypatch.setattr(stream_learner, "CHECKED", 5)
    learner = StreamLearner(model, NUMBERS, lambda: text, graphs)
    model.use_learner(learner)
    with pytest.raises(RKMError, match="has diverged: lower --dynamic-lr"):
        scores(model, text)
    assert learner.segment == 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        {"cell": "rkm_lstm", "share_decoder_input_output_embed": True},
        {"cell": "lstm", "ngram": 2, "memory_clip": None, "learn_initial_state": True},
        {"cell": "rkm_cifg", "no_feedback": True, "ngram": 2, "softmaxes": 2},
        {"cell": "rkm_lstm", "kernel": "gaussian"},
    ],
    ids=lambda flags: f"{flags['cell']}-{flags.get('kernel', 'linear')}",
)
@pytest.mark.parametrize("streams", [1, 3])
def test_on_a_gpu_graphs_give_the_scores_of_plain_passes(dictionary, flags, streams):
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 24, "decoder_hidden_size": 40, **flags}
    model = decoder(dictionary, **sizes).float().cuda()
    training, text = segments(90, 4, 5), segments(60 * streams + 1, streams, 4)
    for batch in text:
        batch["net_input"]["src_tokens"] = batch["net_input"]["src_tokens"].cuda()
    before, found, learners = scores(model, text), [], []
    for graphs in (refused, record):
        learners.append(StreamLearner(model, (1e-3, DECAY, 1e-3), lambda: training, graphs))
        model.use_learner(learners[-1])
        scores(model, text)
        found.append(scores(model, text))
        learners[-1].check()
        learners[-1].passes.dynamic.forget()
    assert not learners[0].passes.scoring
    assert shapes(learners[1].passes.measuring) == [(4, 5)]
    assert shapes(learners[1].passes.scoring) == [(streams, 4)]
    assert (before[-1] - found[0][-1]).abs().max() > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_nothing_is_learned_at_a_rate_of_0(dictionary):
    model, text = decoder(dictionary), segments(30, 1, 4)
    plain = scores(model, text)
    model.use_learner(StreamLearner(model, (0.0, DECAY, EPSILON), lambda: text))
    assert all(torch.equal(one, other) for one, other in zip(scores(model, text), plain, strict=True))


def test_with_a_cache_and_a_temperature_the_model_learns_the_same(dictionary):
    """Both change what is reported, and not what is learned."""
    model, text = decoder(dictionary), segments(30, 1, 4)
    learner = StreamLearner(model, NUMBERS, lambda: text)
    model.use_learner(learner)
    scores(model, text)
    expected = [weight.detach().clone() for weight in model.parameters()]
    model.use_cache(ContinuousCache(9, 0.7, 0.3))
    model.use_temperature(1.3)
    mixed = scores(model, text)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected, strict=True))
    assert_close(mixed[-1].exp().sum(-1), torch.ones(mixed[-1].shape[:2], dtype=mixed[-1].dtype))


@pytest.mark.parametrize("cached", [False, True])
def test_a_temperature_divides_logits_and_1_changes_nothing(dictionary, cached):
    model, text = decoder(dictionary), segments(30, 2, 4)
    plain = [model(batch["net_input"]["src_tokens"], segment=i)[0] for i, batch in enumerate(text)]
    outputs = [model(batch["net_input"]["src_tokens"], segment=i)[1]["features"] for i, batch in enumerate(text)]
    if cached:
        model.use_cache(ContinuousCache(9, 0.7, 0.3))
    before = scores(model, text)
    model.use_temperature(1.0)
    assert all(torch.equal(one, other) for one, other in zip(scores(model, text), before, strict=True))
    model.use_temperature(1.7)
    memory = None
    for batch, logits, output, found in zip(text, plain, outputs, scores(model, text), strict=True):
        wanted = F.log_softmax(logits / 1.7, -1)
        if cached:
            tokens = batch["net_input"]["src_tokens"]
            wanted, memory = model.cache.log_probabilities(wanted, output.transpose(0, 1), tokens, memory)
        assert_close(found.float(), wanted.float())
    training = model.train()(text[0]["net_input"]["src_tokens"], segment=0)
    assert training[0].requires_grad


def test_an_adaptive_softmax_is_refused(dictionary):
    model = decoder(dictionary, adaptive_softmax_cutoff="4,8", criterion_name="adaptive_loss")
    for flag, use in (
        ("--softmax-temperature", lambda: model.use_temperature(1.1)),
        ("--dynamic-eval", lambda: model.use_learner(None)),
        ("--cache-size", lambda: model.use_cache(None)),
    ):
        with pytest.raises(RKMError, match=f"{flag} is for models with a plain softmax"):
            use()
