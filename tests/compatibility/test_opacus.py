"""Training under differential privacy by ``opacus``: the gradients of each sample are right, or are refused."""

import copy

import pytest
import torch
from helpers import assert_close, randomized
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_rkm import RKM, RKMError

opacus = pytest.importorskip("opacus", reason="needs opacus; see CONTRIBUTING, compatibility")

BATCH, STEPS = 4, 5
MODELS = [
    {"cell": "lstm"},
    {"cell": "rkm_lstm", "num_layers": 2, "bidirectional": True, "ngram": 3, "layer_norm": True},
    {"cell": "rkm_cifg", "bias": False, "num_layers": 2, "ngram": 2},
    {"cell": "linear_kernel", "learn_sigma": True},
    {"cell": "gated_cnn", "ngram": 2},
]


class Classifier(nn.Module):
    """One that reads of an RKM's results what it is told to."""

    def __init__(self, rnn, reads):
        super().__init__()
        self.rnn, self.reads, self.out = rnn, reads, nn.LazyLinear(2)

    def forward(self, x, **arguments):
        output, (hidden, cell, *_) = self.rnn(x, **arguments)
        output = output.mean(1 if self.rnn.batch_first else 0)
        read = {"output": output, "hidden": hidden.sin().sum(0), "cell": cell.cos().sum(0)}
        return self.out(torch.cat([read[name] for name in self.reads], dim=1))


def classifier(reads=("output",), **arguments):
    model = Classifier(randomized(RKM(3, 4, **{"batch_first": True, **arguments})), reads)
    model(torch.randn(2, 2, 3))
    return model.train()


def one_by_one(model, x, labels, reduction, **arguments):
    """The gradients of each sample by ordinary means: alone in its batch."""
    gradients = []
    for i in range(BATCH):
        alone = {name: value[i : i + 1] if name != "state" else state_of(value, i) for name, value in arguments.items()}
        loss = nn.functional.cross_entropy(model(x[i : i + 1], **alone), labels[i : i + 1], reduction=reduction)
        given = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in given]))
    return torch.stack(gradients)


def state_of(state, i):
    return state.index_select(torch.tensor([i]))


def by_opacus(model, x, labels, reduction, functorch=False, **arguments):
    wrapped = opacus.GradSampleModule(copy.deepcopy(model), loss_reduction=reduction, force_functorch=functorch)
    nn.functional.cross_entropy(wrapped(x, **arguments), labels, reduction=reduction).backward()
    return torch.cat([p.grad_sample.reshape(BATCH, -1) for p in wrapped.parameters()], dim=1)


def batch():
    return torch.randn(BATCH, STEPS, 3), torch.randint(2, (BATCH,))


@pytest.mark.parametrize("arguments", MODELS, ids=lambda a: a["cell"])
@pytest.mark.parametrize("reads", [("output",), ("hidden",), ("output", "hidden", "cell")], ids="+".join)
def test_gradients_of_each_sample_are_those_of_the_sample_alone(arguments, reads):
    model = classifier(reads, **arguments)
    (x, labels), mask = batch(), torch.zeros(BATCH, STEPS, dtype=torch.bool)
    mask[1, -2:] = mask[2, :1] = True
    x[mask] = torch.nan
    for reduction, given in (
        ("mean", {"padding_mask": mask}),
        ("mean", {"padding_mask": mask, "reset": torch.rand(BATCH, STEPS) < 0.4}),
        ("sum", {"state": model.rnn(torch.randn(BATCH, 2, 3))[1].detach(), "padding_mask": mask}),
    ):
        wanted = one_by_one(model, x, labels, reduction, **given)
        assert_close(by_opacus(model, x, labels, reduction, reduction == "sum", **given), wanted)


class InPieces(nn.Module):
    """Two calls of one layer, the second of which starts from the first's state."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads
        self.rnn, self.out = RKM(3, 4, cell="lstm", batch_first=True), nn.Linear(4, 2)
        self.embed = nn.Linear(3, 3)

    def forward(self, x):
        x = self.embed(x)
        first, state = self.rnn(x[:, :2])
        second, (hidden, *_) = self.rnn(x[:, 2:], state=state)
        read = {"first": first.sum(1), "second": second.sum(1), "hidden": hidden[0]}
        return self.out(sum(read[name] for name in self.reads))


@pytest.mark.parametrize("reads", [("second",), ("first", "second"), ("hidden",), ("hidden", "first")], ids="+".join)
def test_a_layer_that_is_called_twice_behind_another(reads):
    model, (x, labels) = InPieces(reads), batch()
    assert_close(by_opacus(model, x, labels, "mean"), one_by_one(model, x, labels, "mean"))


def test_time_first():
    model = RKM(3, 4)
    wrapped = opacus.GradSampleModule(copy.deepcopy(model), batch_first=False, loss_reduction="sum")
    x = torch.randn(STEPS, BATCH, 3)
    wrapped(x)[0].square().sum().backward()
    wanted = torch.autograd.grad(model(x[:, 1:2])[0].square().sum(), list(model.parameters()))
    for parameter, gradient in zip(wrapped.parameters(), wanted, strict=True):
        assert_close(parameter.grad_sample[1], gradient)


def private(model, noise=0.0, largest=1e6, mode="hooks", **arguments):
    """The model, optimizer and loader that ``PrivacyEngine`` makes, as its users write it."""
    x, labels = torch.randn(16, STEPS, 3), torch.randint(2, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader = DataLoader(TensorDataset(x, labels), batch_size=BATCH)
    engine = opacus.PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=largest,
        grad_sample_mode=mode, **arguments,
    )  # fmt: skip
    return engine, loader, *made


def train(model, optimizer, loader, criterion=nn.functional.cross_entropy):
    for x, labels in loader:
        optimizer.zero_grad()
        criterion(model(x), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.filterwarnings("ignore")
def test_without_noise_and_clipping_it_is_ordinary_training(mode):
    model = classifier(cell="rkm_cifg", ngram=2)
    plain = copy.deepcopy(model)
    _, loader, model, optimizer, *criterion, _ = private(
        model, mode=mode, poisson_sampling=False, **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {})
    )
    train(model, optimizer, loader, *criterion)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.5), loader)
    for given, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(given, wanted)


@pytest.mark.filterwarnings("ignore")
def test_private_training_with_samples_drawn_at_random():
    """Batches of other sizes, empty ones among them."""
    model = classifier(("hidden",), cell="lstm", num_layers=2, bias=False)
    before = copy.deepcopy(model)
    assert opacus.validators.ModuleValidator.validate(model) == []
    engine, _, model, optimizer, loader = private(model, noise=1.0, largest=1.0)
    loader.batch_sampler.sample_rate = 0.05
    for _ in range(3):
        train(model, optimizer, loader)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model._module.rnn.weight_hh_l0, before.rnn.weight_hh_l0)
    assert 0 < engine.get_epsilon(delta=1e-3) < 100
    assert model.remove_hooks() is None
    model._module(torch.randn(2, STEPS, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_what_would_be_wrong_is_refused_in_a_sentence():
    x, labels = batch()
    for arguments in ({"dropout": 0.1, "num_layers": 2}, {"weight_dropout": 0.1}, {"state_dropout": 0.1}):
        with pytest.raises(RKMError, match="its dropout draws other masks"):
            by_opacus(classifier(**arguments), x, labels, "mean")
    model = opacus.GradSampleModule(RKM(3, 4))
    with pytest.raises(RKMError, match="make the RKM with batch_first=True"):
        model(x)
    model.eval()(x)
    with pytest.raises(RKMError, match="no gradients through an RKM's memories: train without return_memory"):
        opacus.GradSampleModule(RKM(3, 4, batch_first=True))(x, return_memory=True)
    _, loader, model, optimizer, criterion, _ = private(
        classifier(("hidden",)), mode="ghost", poisson_sampling=False, criterion=nn.CrossEntropyLoss()
    )
    with pytest.raises(RKMError, match="sees an RKM's output alone"):
        train(model, optimizer, loader, criterion)
