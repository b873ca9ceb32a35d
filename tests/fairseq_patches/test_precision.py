from types import SimpleNamespace

import pytest
import torch
from fairseq import utils
from fairseq.optim import AMPOptimizer, FP16Optimizer
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm.fairseq_patches import precision

fairseq_rkm.register()
HALF_PRECISION = ("_sync_fp16_grads_to_fp32", "_sync_fp32_params_to_fp16", "zero_grad")
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
    for wrapper in (
        precision.gradients_to_float_at_once, precision.weights_to_half_at_once, precision.clear_gradients_at_once,
    ):  # fmt: skip
        wrapper(called.append)(flat)
        assert called.pop() is flat


def test_the_methods_are_replaced_once():
    fairseq_rkm.register()
    assert not any(hasattr(getattr(FP16Optimizer, name).__wrapped__, "__wrapped__") for name in HALF_PRECISION)


def test_mixed_precision_unscales_gradients_once():
    """With SGD the update is lr times the clipped gradient, whatever the loss scale."""
    fairseq_rkm.register()
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    cfg = {
        "optimizer": {"_name": "nt_asgd", "lr": [0.5], "task_name": None},
        "common": {"fp16_init_scale": 128, "min_loss_scale": 1e-4},
    }  # fmt: skip
    optimizer = AMPOptimizer.build_optimizer(OmegaConf.create(cfg), [weight])
    optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=128)
    for scaled in (1.0, torch.inf):
        before = weight.detach().clone()
        optimizer.zero_grad()
        optimizer.backward(scaled * (weight * torch.tensor([6.0, 8.0])).sum())
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        expected = before if scaled > 1 else before - 0.5 * torch.tensor([0.6, 0.8])
        torch.testing.assert_close(weight.detach(), expected)
    assert optimizer.optimizer.param_groups[0]["updates"] == 1, "an overflow is no update"


@pytest.mark.parametrize("aggregate", [None, lambda norm: 2 * norm])
@pytest.mark.parametrize("sizes", [[3], [2, 4]])
def test_gradients_on_the_host_are_clipped_beside_a_gpu(aggregate, sizes):
    """Which only a machine with a GPU can fail: there fairseq's own norm is on the GPU."""
    fairseq_rkm.register()
    weights = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 2.0)
    norm = utils.clip_grad_norm_(iter(weights), 1.0, aggregate)
    wanted = 2 * sum(sizes) ** 0.5 * (1 if aggregate is None else 2)
    assert norm.device == weights[0].grad.device
    assert norm.item() == pytest.approx(wanted)
    for weight in weights:
        torch.testing.assert_close(weight.grad, torch.full_like(weight, 2 / wanted))
    assert utils.clip_grad_norm_([torch.nn.Parameter(torch.zeros(1))], 1.0) == 0


def test_what_fairseq_has_wrapped_itself_is_wrapped_once():
    fairseq_rkm.register()
    assert utils.clip_grad_norm_.__wrapped__.__module__ == "fairseq.utils"
    assert utils.clip_grad_norm_.__code__.co_filename == precision.__file__
    before = utils.clip_grad_norm_
    fairseq_rkm.register()
    assert utils.clip_grad_norm_ is before
