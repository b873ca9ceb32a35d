import math
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.logging import metrics
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.criterions.cross_entropy_ar_tar import CrossEntropyARTARCriterion
from fairseq_rkm.models.language_model.language_model_decoder import RKMLanguageModelDecoder
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig


class Task:
    """As much of a task as a criterion looks at."""

    def __init__(self) -> None:
        self.target_dictionary = Dictionary()
        for i in range(20):
            self.target_dictionary.add_symbol(f"w{i}")


TASK = Task()


def model(**flags):
    sizes = {"decoder_embed_dim": 6, "decoder_hidden_size": 8, "criterion_name": None, "dropout": 0.5}
    cfg = OmegaConf.structured(RKMLanguageModelConfig(**{**sizes, **flags}))
    return RKMLanguageModel(RKMLanguageModelDecoder(cfg, TASK.target_dictionary, TASK.target_dictionary))


def sample(rows=3, steps=7, padded=0):
    target = torch.randint(4, 24, (rows, steps))
    if padded:
        target[0, -padded:] = TASK.target_dictionary.pad()
    source = torch.randint(4, 24, (rows, steps))
    return {
        "net_input": {"src_tokens": source, "segment": 0}, "target": target, "ntokens": int(target.ne(1).sum()),
    }  # fmt: skip


def by_hand(built, batch, alpha, beta):
    """Sums over each real position, in Python."""
    torch.manual_seed(7)
    logits, extra = built(**batch["net_input"])
    pad, nll, ar, tar, pairs = TASK.target_dictionary.pad(), 0.0, 0.0, 0.0, 0
    for b, row in enumerate(batch["target"].tolist()):
        for t, word in enumerate(row):
            if word == pad:
                continue
            nll += torch.logsumexp(logits[b, t], 0).item() - logits[b, t, word].item()
            ar += sum(v * v for v in extra["features"][t, b].tolist()) / extra["features"].size(2)
            if t and not (built.decoder.reset_at_eos and batch["net_input"]["src_tokens"][b, t] == 2):
                change = (extra["raw_features"][t, b] - extra["raw_features"][t - 1, b]).tolist()
                tar += sum(v * v for v in change) / len(change)
                pairs += 1
    tokens = batch["ntokens"]
    return nll + tokens * (alpha * ar / tokens + beta * (tar / pairs if pairs else 0)), nll, ar


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("steps", "padded"), [(7, 0), (7, 2), (1, 0)])
def test_the_loss_is_the_sums_by_hand(steps, padded, anew):
    """With ``--reset-at-eos`` a sentence's first output is no change of the last one's before."""
    built, batch = model(reset_at_eos=anew).train(), sample(steps=steps, padded=padded)
    batch["net_input"]["src_tokens"][1, 3 % steps] = TASK.target_dictionary.eos()
    expected, nll, ar = by_hand(built, batch, 2.0, 1.5)
    torch.manual_seed(7)
    loss, size, logged = CrossEntropyARTARCriterion(TASK, False, 2.0, 1.5)(built, batch)
    assert size == batch["ntokens"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logged["nll_loss"].item() == pytest.approx(nll, rel=1e-5)
    assert logged["ar"].item() == pytest.approx(ar, rel=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in built.parameters())


def test_ar_is_of_the_dropped_output_and_tar_of_the_output_before():
    built = model(dropout=0.9).train()
    _, extra = built(**sample()["net_input"])
    assert extra["features"].eq(0).any()
    assert extra["raw_features"].ne(0).all()
    assert not extra["features"].eq(0).all()


def test_evaluation_is_cross_entropy_alone_and_perplexity_is_of_it():
    built, batch = model(), sample(padded=1)
    criterion = CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0)
    loss, _, logged = criterion(built.eval(), batch)
    assert loss.item() == logged["nll_loss"].item()
    assert "ar" not in logged
    trained = criterion(built.train(), batch)[2]
    with metrics.aggregate() as meters:
        criterion.reduce_metrics([trained, trained])
        values = meters.get_smoothed_values()
    nll = trained["nll_loss"].item() / batch["ntokens"]
    assert values["ppl"] == pytest.approx(math.exp(nll), rel=1e-3)
    assert values["loss"] > values["nll_loss"] == pytest.approx(nll / math.log(2), abs=1e-3)
    assert values["ar"] == pytest.approx(trained["ar"].item() / batch["ntokens"], abs=1e-5)


def test_a_mean_over_sentences_keeps_the_weights():
    built, batch = model(dropout=0.0).train(), sample()
    loss, size, logged = CrossEntropyARTARCriterion(TASK, True, 2.0, 1.0)(built, batch)
    assert size == 3
    tokens = batch["ntokens"]
    expected = logged["nll_loss"] + 3 * (2 * logged["ar"] + logged["tar"]) / tokens
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_adaptive_softmax_is_the_same_loss_as_its_full_probabilities():
    built, batch = model(adaptive_softmax_cutoff="8,16", decoder_hidden_size=32, dropout=0.0), sample(padded=2)
    loss, _, _ = CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0)(built.eval(), batch)
    log_probs = built.get_normalized_probs(built(**batch["net_input"]), log_probs=True)
    real = batch["target"].ne(1)
    expected = -log_probs[real].gather(1, batch["target"][real].unsqueeze(1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("alpha", "beta", "flag"), [(-1.0, 1.0, "--alpha"), (1.0, -0.1, "--beta"), (math.nan, 1, "")])
def test_weights_below_0_are_refused(alpha, beta, flag):
    with pytest.raises(RKMError, match=f"{flag}.* must be 0 or more"):
        CrossEntropyARTARCriterion(TASK, False, alpha, beta)


def test_a_model_without_the_output_is_refused():
    class Plain(torch.nn.Module):
        decoder = None

        def forward(self, src_tokens, segment):
            return torch.zeros(*src_tokens.shape, 24), {}

        def get_normalized_probs(self, output, log_probs):
            return output[0].log_softmax(-1)

        def get_targets(self, batch, output):
            return batch["target"]

    with pytest.raises(RKMError, match="Plain does not: use --arch rkm_lm"):
        CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0)(Plain().train(), sample())


def softmax(scores):
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def dot(one, other):
    return sum(x * y for x, y in zip(one, other, strict=True))


def past_by_hand(logits, embedding, bias, word):
    """Of one position: the mean embedding of the next word scores the words that may have come before."""
    predicted = softmax(logits)
    mean = [dot(predicted, column) for column in zip(*embedding, strict=True)]
    return -math.log(softmax([dot(row, mean) + b for row, b in zip(embedding, bias, strict=True)])[word])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [0, 2])
def test_past_decode_is_the_sum_by_hand(tied, padded):
    built = model(share_decoder_input_output_embed=tied, decoder_hidden_size=6).double().train()
    batch = sample(padded=padded)
    criterion = CrossEntropyARTARCriterion(TASK, False, 0.0, 0.0, 0.25).double()
    torch.nn.init.normal_(criterion.past.bias)
    torch.manual_seed(7)
    logits, _ = built(**batch["net_input"])
    embedding, bias = built.decoder.embed_tokens.weight.tolist(), criterion.past.bias.tolist()
    real = [(b, t) for b in range(3) for t in range(7) if batch["target"][b, t] != 1]
    words = batch["net_input"]["src_tokens"]
    past = [past_by_hand(logits[at].tolist(), embedding, bias, int(words[at])) for at in real]
    torch.manual_seed(7)
    loss, size, logged = criterion(built, batch)
    assert size == len(real)
    assert logged["past_nll"].item() == pytest.approx(sum(past), rel=1e-6)
    assert loss.item() == pytest.approx(logged["nll_loss"].item() + 0.25 * sum(past), rel=1e-6)


def test_the_past_is_decoded_with_a_gradient_to_all_that_it_is_made_of():
    built, batch = model(dropout=0.0, share_decoder_input_output_embed=True, decoder_hidden_size=6).train(), sample()
    with_past = CrossEntropyARTARCriterion(TASK, False, 0.0, 0.0, 1.0)
    without = CrossEntropyARTARCriterion(TASK, False, 0.0, 0.0)
    assert [tuple(p.shape) for p in with_past.parameters()] == [(24,)]
    assert not list(without.parameters())
    gradients = []
    for criterion in (with_past, without):
        built.zero_grad()
        loss, size, _ = criterion(built, batch)
        (loss / size).backward()
        gradients.append({name: p.grad.clone() for name, p in built.named_parameters()})
    for name, gradient in gradients[0].items():
        assert not torch.allclose(gradient, gradients[1][name]), name
    assert with_past.past.bias.grad.abs().sum() > 0
    assert with_past.past.bias.grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_a_checkpoint_without_a_bias_begins_it_at_0():
    criterion = CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, 0.1)
    criterion.load_state_dict(None, strict=True)
    assert not criterion.past.bias.any()
    criterion.load_state_dict({"past.bias": torch.ones(24)}, strict=True)
    assert criterion.past.bias.eq(1).all()


def test_evaluation_does_not_decode_the_past_and_the_log_has_it_apart():
    built, batch = model(), sample(padded=1)
    full, plain = (
        CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, 0.5),
        CrossEntropyARTARCriterion(TASK, False, 0, 0),
    )
    (loss, _, logged), (wanted, _, _) = (criterion(built.eval(), batch) for criterion in (full, plain))
    assert loss.item() == wanted.item() == logged["nll_loss"].item()
    assert "past_nll" not in logged
    trained = full(built.train(), batch)[2]
    with metrics.aggregate() as meters:
        full.reduce_metrics([trained, trained])
        values = meters.get_smoothed_values()
    assert values["past_nll"] == pytest.approx(trained["past_nll"].item() / batch["ntokens"] / math.log(2), abs=1e-4)
    assert values["ppl"] == pytest.approx(math.exp(trained["nll_loss"].item() / batch["ntokens"]), rel=1e-3)


def test_an_adaptive_softmax_has_no_distribution_to_decode():
    built = model(adaptive_softmax_cutoff="8,16", decoder_hidden_size=32).train()
    with pytest.raises(RKMError, match="--past-decode is for models with a plain softmax"):
        CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, 0.1)(built, sample())
    with pytest.raises(RKMError, match=r"--past-decode must be 0 or more, not -0\.1"):
        CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, -0.1)


def test_another_dictionary_of_inputs_is_refused():
    cfg = OmegaConf.structured(RKMLanguageModelConfig(decoder_embed_dim=6, decoder_hidden_size=8, criterion_name=None))
    smaller = Dictionary()
    built = RKMLanguageModel(RKMLanguageModelDecoder(cfg, TASK.target_dictionary, smaller)).train()
    batch = sample()
    batch["target"].fill_(3)
    with pytest.raises(RKMError, match="one dictionary, but the input's has 24 types and the output's 4"):
        CrossEntropyARTARCriterion(SimpleNamespace(target_dictionary=smaller), False, 0.0, 0.0, 0.1)(built, batch)
