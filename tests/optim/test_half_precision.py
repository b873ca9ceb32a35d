from types import SimpleNamespace

import pytest
import torch
from fairseq.optim import FP16Optimizer

import fairseq_rkm
from fairseq_rkm.compat import HALF_PRECISION

fairseq_rkm.register()
SHAPES = [(3, 4), (5,), (2, 2, 2)]


def optimizer(scale=None, frozen=False):
    """As much of fairseq's as these methods look at, with gradients of both kinds."""
    torch.manual_seed(0)
    half = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    half[-1].requires_grad_(not frozen)
    whole = FP16Optimizer.build_fp32_params(None, half, flatten=False)
    for p, p32 in zip(half, whole, strict=True):
        p32.data.add_(torch.randn_like(p32))
        p.grad, p32.grad = torch.randn_like(p), torch.randn_like(p32)
    half[0].grad = None
    scaler = None if scale is None else SimpleNamespace(loss_scale=scale)
    return SimpleNamespace(
        fp16_params=half,
        fp32_params=whole,
        _needs_sync=True,
        scaler=scaler,
        _multiply_factor=3.0,
        has_flat_params=False,
    )


@pytest.mark.parametrize("name", HALF_PRECISION)
@pytest.mark.parametrize("scale", [None, 8])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_what_fairseq_does_one_by_one(name, scale, frozen):
    given, wanted = optimizer(scale, frozen), optimizer(scale, frozen)
    getattr(FP16Optimizer, name)(given)
    getattr(FP16Optimizer, name).__wrapped__(wanted)
    for g, w in zip(given.fp16_params + given.fp32_params, wanted.fp16_params + wanted.fp32_params, strict=True):
        assert torch.equal(g, w)
        assert (g.grad is None) == (w.grad is None)
        assert g.grad is None or torch.equal(g.grad, w.grad)
    assert (given._needs_sync, given._multiply_factor) == (wanted._needs_sync, wanted._multiply_factor)


def test_flat_weights_are_left_to_fairseq():
    flat, called = SimpleNamespace(has_flat_params=True), []
    for name, copy in HALF_PRECISION.items():
        fairseq_rkm.compat.half_precision.at_once(copy, called.append)(flat)
        assert called.pop() is flat, name


def test_the_methods_are_replaced_once():
    fairseq_rkm.register()
    assert not any(hasattr(getattr(FP16Optimizer, name).__wrapped__, "__wrapped__") for name in HALF_PRECISION)
