import pytest
import torch
import torch.distributed as dist
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.distributed import utils as distributed_utils
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fairseq_rkm
from fairseq_rkm.optim.gradient_buckets import ALIGNMENT, GradientBuckets, buckets_of

fairseq_rkm.register()


class Processes:
    """Three processes; the others have this one's gradients times 2 and times 3."""

    size, backend = 3, "gloo"

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(dist, "get_backend", lambda _group: self.backend)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(distributed_utils, "get_world_size", lambda _group: self.size)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        assert group == "ours"
        self.calls.append(tensor.numel())
        tensor.mul_(6 if op == dist.ReduceOp.SUM else 2)


@pytest.fixture
def processes(monkeypatch):
    return Processes(monkeypatch)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 70), nn.Linear(70, 1))
    model[1].bias.requires_grad_(False)
    return model


def backward(model):
    """Gradients for all weights but the last layer's."""
    torch.manual_seed(1)
    model[1](model[0](torch.randn(2, 3))).square().sum().backward()


def wrapped(model):
    return LegacyDistributedDataParallel(model, process_group="ours")


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_gradients_are_those_of_fairseqs_own_wrapper(processes):
    models = build(), build()
    wrapper, fairseqs = map(wrapped, models)
    one_by_one = LegacyDistributedDataParallel.all_reduce_grads.__wrapped__
    for _ in range(2):
        for model in models:
            model.zero_grad()
            backward(model)
        wrapper.all_reduce_grads()
        one_by_one(fairseqs)
        for mine, wanted in zip(*map(gradients, models), strict=True):
            torch.testing.assert_close(mine, wanted)
            assert mine.any() == wanted.any()


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_one_call_averages_all_gradients_where_they_are(processes, backend):
    processes.backend = backend
    model = build()
    backward(model)
    before = [None if grad is None else grad.clone() for grad in gradients(model)]
    buckets = buckets_of(wrapped(model))
    buckets.average("ours")
    assert len(processes.calls) == 1
    for grad, place, old in zip(gradients(model), buckets.places, before, strict=True):
        assert grad is place
        torch.testing.assert_close(grad, torch.zeros_like(grad) if old is None else 2 * old)
    model[0].weight.grad.fill_(1)  # as a replay writes it
    buckets.average("ours")
    assert model[0].weight.grad.eq(2).all()


def test_accumulated_gradients_are_averaged_once(processes):
    model = build()
    wrapper = wrapped(model)
    backward(model)
    once = model[0].weight.grad.clone()
    with wrapper.no_sync():
        wrapper.all_reduce_grads()
    assert not processes.calls
    backward(model)
    wrapper.all_reduce_grads()
    torch.testing.assert_close(model[0].weight.grad, 4 * once)
    backward(model)
    torch.testing.assert_close(model[0].weight.grad, 5 * once)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=6),
    half=st.lists(st.booleans(), min_size=6, max_size=6),
    largest=st.integers(1, 200),
)
def test_places_of_any_weights_do_not_overlap(sizes, half, largest):
    dtypes = [torch.half if h else torch.float for h in half]
    weights = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in zip(sizes, dtypes, strict=False)]
    buckets = GradientBuckets(weights, largest)
    assert len(buckets.buckets) == len({w.dtype for w in weights})
    for number, (weight, place) in enumerate(zip(weights, buckets.places, strict=True)):
        assert (place.shape, place.dtype) == (weight.shape, weight.dtype)
        assert place.storage_offset() % ALIGNMENT == 0
        place.fill_(number + 1)
    for number, place in enumerate(buckets.places):
        assert place.eq(number + 1).all()
    assert sum(int(b.ne(0).sum()) for b in buckets.buckets) == sum(w.numel() for w in weights)


def test_large_buckets_are_averaged_in_parts(processes):
    model = build()
    backward(model)
    wanted = 2 * model[0].weight.grad
    GradientBuckets([p for p in model.parameters() if p.requires_grad], largest=100).average("ours")
    assert max(processes.calls) == 100
    torch.testing.assert_close(model[0].weight.grad, wanted)


def test_weights_that_are_frozen_later_are_left_alone(processes):
    model = build()
    wrapper = wrapped(model)
    known = buckets_of(ModuleProxyWrapper(wrapper))
    assert buckets_of(wrapper) is known
    model[0].bias.requires_grad_(False)
    backward(model)
    wrapper.all_reduce_grads()
    assert model[0].bias.grad is None
    assert len(buckets_of(wrapper).weights) == len(known.weights) - 1


def test_a_model_without_such_a_wrapper_has_none():
    assert buckets_of(build()) is None
