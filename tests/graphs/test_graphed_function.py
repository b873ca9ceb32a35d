import pytest
import torch
from helpers import DEVICES, run_at_once
from torch import nn

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.graphs import graphed_function
from fairseq_rkm.graphs.graphed_function import GraphedFunction
from fairseq_rkm.graphs.recording import record


class Model(nn.Module):
    """Tokens of two kinds to two outputs; one weight is never used, and one is used outside as well."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.rkm = RKM(6, 8, layer_norm=True, bidirectional=True)
        self.output = nn.Linear(16, 6)
        self.unused = nn.Parameter(torch.zeros(3))

    def features(self, first, second):
        x = nn.functional.dropout(self.embedding(first), 0.3)
        output, state = self.rkm(x, padding_mask=first.t().eq(1))
        return self.output(output) + self.embedding(second).mean(0), state.cell

    def loss(self, features, cell):
        return nn.functional.linear(features, self.embedding.weight).logsumexp(-1).mean() + cell.square().mean()


def batches(device):
    generator = torch.Generator().manual_seed(1)
    for steps, rows in [(5, 3), (4, 3), (5, 3), (5, 3), (4, 3), (6, 2), (5, 3)]:
        yield tuple(torch.randint(1, 20, (n, rows), generator=generator).to(device) for n in (steps, 2))


def train(device, graphed, accumulate=1):
    """The losses, and the weights at the end."""
    torch.manual_seed(0)
    model, losses = Model().to(device), []
    function = model.features
    if graphed:
        function = GraphedFunction(function, list(model.parameters()), record if device == "cuda" else run_at_once)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number, batch in enumerate(batches(device)):
        torch.manual_seed(number)
        loss = model.loss(*function(*batch))
        loss.backward()
        losses.append(loss.detach())
        if (number + 1) % accumulate == 0:
            assert model.unused.grad is None
            optimizer.step()
            optimizer.zero_grad()
    if graphed:
        assert [shapes[0] for shapes in function.recorded] == [(4, 3), (5, 3)], "those that have been met before"
    return torch.stack(losses), [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_of_replayed_passes_is_the_same_training(device, accumulate):
    (wanted, weights), (given, replayed) = (train(device, graphed, accumulate) for graphed in (False, True))
    # Gradients of the embedding, which is used outside as well, are added up in another order.
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=0)
    for got, want in zip(replayed, weights, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_output_without_a_gradient_and_one_without_the_other():
    torch.manual_seed(0)
    model = Model()
    weights = list(model.parameters())
    function = GraphedFunction(model.features, weights, run_at_once)
    batch = next(batches("cpu"))
    function(*batch)
    for which in (0, 1):
        grads = []
        for f in (model.features, function):
            torch.manual_seed(3)
            loss = 2 * f(*batch)[which].sum()
            grads.append(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_forward_pass_between_another_and_its_backward_pass_is_refused():
    model = Model()
    function = GraphedFunction(model.features, list(model.parameters()), run_at_once)
    batch = next(batches("cpu"))
    first, second, third = (function(*batch)[0].sum() for _ in range(3))
    third.backward()
    with pytest.raises(RKMError, match="two forward passes before the first one's backward pass"):
        second.backward()
    first.backward()  # met for the first time, it was no replay


def test_derivatives_of_recorded_gradients_are_refused():
    weight = nn.Parameter(torch.ones(3))
    function = GraphedFunction(lambda x: (x * weight,), [weight], run_at_once, "train without graphs")
    function(torch.ones(3))
    (output,) = function(torch.ones(3))
    with pytest.raises(RKMError, match=r"have no derivatives of their own \(create_graph\): train without graphs"):
        torch.autograd.grad(output.sum(), weight, create_graph=True)


def test_more_shapes_than_are_kept_are_done_without(monkeypatch):
    monkeypatch.setattr(graphed_function, "MOST_SHAPES", 1)
    model = Model()
    function = GraphedFunction(model.features, list(model.parameters()), run_at_once)
    for batch in batches("cpu"):
        model.loss(*function(*batch)).backward()
    assert [shapes[0] for shapes in function.recorded] == [(5, 3)]
