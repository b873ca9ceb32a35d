"""The cross entropy of words against sums in float64: by PyTorch, and by Triton's kernels on a GPU or interpreted."""

import copy
import logging
import math

import pytest
import torch
from helpers import assert_close
from ops.backends.triton_interpreter import DEVICE, HAS_GPU, run_interpreted, runs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from criterions.test_cross_entropy_ar_tar import TASK, model, sample
from fairseq_rkm.criterions import word_costs as subject
from fairseq_rkm.criterions.cross_entropy_ar_tar import CrossEntropyARTARCriterion
from fairseq_rkm.criterions.word_costs import word_costs
from fairseq_rkm.models.language_model import language_model_decoder
from fairseq_rkm.modules.word_logits import padded_logits

IGNORED = 3


def problem(dtype, width, rows=6, device=DEVICE):
    """Logits, words, and gradients of costs and probabilities; the logits' last columns may hold -inf."""
    torch.manual_seed(width)
    logits = 4 * torch.randn(rows, width)
    words = torch.randint(0, width, (rows,))
    words[1 % rows] = IGNORED
    if width > 20:
        logits[:, -5:] = -math.inf
        logits[0, :-7] = -math.inf  # whole blocks without a finite number
        words[0], words[2:] = width - 6, words[2:] % (width - 5)
    grads = torch.randn(rows), torch.randn(rows, width)
    return [tensor.to(device) for tensor in (logits.to(dtype), words, grads[0], grads[1].to(dtype))]


def by_sums(logits, words, grad_costs, grad_probabilities):
    """Costs, probabilities and the gradient of logits, in float64."""
    powers = torch.exp(logits.double())
    probabilities = powers / powers.sum(1, keepdim=True)
    counts = words.ne(IGNORED)
    is_word = torch.arange(logits.size(1), device=words.device) == words.unsqueeze(1)
    costs = -torch.log((probabilities * is_word).sum(1)) * counts
    slopes = grad_probabilities.double() - (probabilities * grad_probabilities).sum(1, keepdim=True)
    to_costs = (grad_costs.double() * counts).unsqueeze(1)
    return costs, probabilities, probabilities * slopes + to_costs * (probabilities - is_word.double())


def compare(dtype, width, device=DEVICE):
    logits, words, grad_costs, grad_probabilities = problem(dtype, width, device=device)
    wanted = by_sums(logits, words, grad_costs, grad_probabilities)
    logits.requires_grad_()
    costs, probabilities = word_costs(logits, words, IGNORED, predict=True)
    (grad,) = torch.autograd.grad([costs, probabilities], logits, [grad_costs, grad_probabilities.to(probabilities)])
    assert grad.dtype == dtype
    for name, given, right in zip(("costs", "p", "gradient"), (costs, probabilities, grad), wanted, strict=True):
        assert_close(given, right, name, None if name == "costs" else dtype)
    return costs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4, 70])
def test_pytorch_s_costs_are_the_sums(dtype, width):
    assert compare(dtype, width, "cpu").dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [4, 70, 150])
def test_a_kernel_s_costs_are_the_sums(monkeypatch, dtype, width):
    """Of rows that fit into a block, and of rows that take several."""
    monkeypatch.setattr(subject, "WORDS_AT_ONCE", 32)
    assert type(compare(dtype, width).grad_fn).__name__ == "_WordCostsBackward"


@runs
@pytest.mark.parametrize("part", ["costs", "probabilities"])
def test_a_kernel_needs_no_gradient_of_the_other_part(part):
    logits, words, *grads = problem(torch.float32, 70)
    results = word_costs(logits.requires_grad_(), words, IGNORED, predict=True)
    at = ["costs", "probabilities"].index(part)
    (grad,) = torch.autograd.grad(results[at], logits, grads[at])
    grads[1 - at].zero_()
    assert_close(grad, by_sums(logits.detach(), words, *grads)[2])


@runs
def test_a_kernel_takes_rows_and_gradients_that_lie_apart():
    """A cut of wider logits, and a sum's gradient, one number for all rows."""
    logits, words, *_ = problem(torch.float32, 70)
    wide = logits.repeat(1, 2).requires_grad_()
    costs, none = word_costs(wide[:, :70], words, IGNORED, "sum")
    assert none is None
    (grad,) = torch.autograd.grad(costs, wide)
    ones, zeros = torch.ones(6, device=DEVICE), torch.zeros(6, 70, device=DEVICE)
    wanted, _, gradient = by_sums(logits, words, ones, zeros)
    assert_close(costs, wanted.sum())
    assert_close(grad[:, :70], gradient)
    assert not grad[:, 70:].any()


@runs
def test_what_is_no_number_and_words_that_there_are_not_cost_no_number():
    logits, words, *_ = problem(torch.float32, 70)
    words[3], words[4], logits[5, 2] = 70, -1, math.nan
    costs = word_costs(logits, words, IGNORED)[0]
    assert costs.isfinite().tolist() == [True, True, True, False, False, False]


class LargeTensors(TorchDispatchMode):
    """Note the dtypes of all tensors of a shape that operators make, read, or write."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        for tensor in tree_leaves((args, results)):
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.shape:
                self.found.append(tensor.dtype)
        return results


@runs
def test_no_tensor_of_the_vocabulary_is_of_float32():
    logits, words, *_ = problem(torch.bfloat16, 70)
    weight = torch.randn(70, 4, dtype=torch.bfloat16, device=DEVICE)
    logits.nan_to_num_(neginf=-9.0).requires_grad_()
    with LargeTensors(logits.shape) as large:
        costs, probabilities = word_costs(logits, words, IGNORED, "sum", predict=True)
        (costs + (probabilities @ weight).sum()).backward()
    assert set(large.found) == {torch.bfloat16}


@runs
@pytest.mark.parametrize(
    "flags", [{}, {"softmaxes": 2}, {"adaptive_softmax_cutoff": "8,16", "decoder_hidden_size": 32}]
)
def test_training_by_kernels_is_training_by_pytorch(monkeypatch, flags):
    past = 0.0 if "adaptive_softmax_cutoff" in flags else 0.5
    batch = {name: value.to(DEVICE) if name == "target" else value for name, value in sample(padded=2).items()}
    batch["net_input"]["src_tokens"] = batch["net_input"]["src_tokens"].to(DEVICE)
    built, criterion = model(dropout=0.0, **flags).to(DEVICE), CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, past)
    results = []
    for takes in (subject._are_taken, lambda _: False):
        monkeypatch.setattr(subject, "_are_taken", takes)
        trained, own = copy.deepcopy(built).train(), copy.deepcopy(criterion).to(DEVICE)
        loss, _, logged = own(trained, batch)
        loss.backward()
        named = (*trained.named_parameters(), *own.named_parameters())
        results.append({"loss": loss.data, **{n: p.grad for n, p in named}, "nll": logged["nll_loss"]})
    for name, value in results[0].items():
        assert_close(value, results[1][name], name, "tf32" if HAS_GPU else None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softmaxes", [1, 2])
def test_further_columns_change_nothing(monkeypatch, tied, softmaxes):
    sizes = {"share_decoder_input_output_embed": tied, "decoder_hidden_size": 6, "softmaxes": softmaxes}
    built, batch = model(dropout=0.0, **sizes).double().train(), sample(padded=2)
    results = []
    for padding in (0, 8):
        monkeypatch.setattr(language_model_decoder, "word_logits", lambda *a, n=padding: padded_logits(*a, n))
        monkeypatch.setattr(
            "fairseq_rkm.modules.softmax_mixture.word_logits", lambda *a, n=padding: padded_logits(*a, n)
        )
        trained, criterion = copy.deepcopy(built), CrossEntropyARTARCriterion(TASK, False, 2.0, 1.0, 0.5).double()
        output, extra = trained(**batch["net_input"])
        assert output.shape == (3, 7, 24)
        assert extra["logits"].size(2) == 24 + (padding if softmaxes == 1 else 0)
        loss, _, _ = criterion(trained, {**batch, "net_input": {**batch["net_input"], "segment": 0}})
        loss.backward()
        named = (*trained.named_parameters(), *criterion.named_parameters())
        results.append({"loss": loss.data, "output": output.data, **{name: p.grad for name, p in named}})
    for name, value in results[0].items():
        assert_close(results[1][name], value, name)


def test_rows_that_there_are_not_cost_nothing():
    costs, probabilities = word_costs(
        torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), reduction="sum", predict=True
    )
    assert costs == 0
    assert probabilities.shape == (0, 5)


@runs
def test_where_triton_cannot_compile_pytorch_goes_on_and_it_is_said_once(monkeypatch, caplog):
    def broken(*_args, **_flags):
        raise RuntimeError("first line\nFailed to find C compiler")

    monkeypatch.setattr(subject, "_launch", broken)
    subject._compiles.cache_clear()
    logits, words, *grads = problem(torch.float32, 70)
    with caplog.at_level(logging.WARNING):
        costs = [word_costs(logits, words, IGNORED)[0] for _ in range(2)]
    subject._compiles.cache_clear()
    assert_close(costs[1], by_sums(logits, words, *grads)[0], dtype=torch.float32)
    assert [record.getMessage().count("Failed to find C compiler") for record in caplog.records] == [1]


@pytest.mark.slow
def test_kernels_under_the_interpreter():
    run_interpreted("../../criterions/test_word_costs.py")
