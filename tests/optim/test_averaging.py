import io

import pytest
import torch
from omegaconf import OmegaConf

from fairseq_rkm import RKMError
from fairseq_rkm.optim.adamw_average import AveragedAdamW, AveragedAdamWConfig, FairseqAveragedAdamW, parse_betas
from fairseq_rkm.optim.averaging import put_average
from fairseq_rkm.optim.nt_asgd import FairseqNonMonotoneASGD, NonMonotoneASGD, NonMonotoneASGDConfig


def weights(count=2):
    return [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(count)]


def step(optimizer, params):
    """One update with a random gradient."""
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return [p.detach().clone() for p in params]


def averages(optimizer, params):
    return [optimizer.state[p]["average"] for p in params]


def test_the_average_is_the_mean_of_the_iterates_since_the_switch():
    params = weights()
    optimizer = NonMonotoneASGD(params, 5, lr=0.1, fused=True)
    for _ in range(3):
        step(optimizer, params)
    assert not any(optimizer.state[p] for p in params)
    optimizer.start_averaging()
    iterates = [step(optimizer, params) for _ in range(6)]
    for average, history in zip(averages(optimizer, params), zip(*iterates, strict=True), strict=True):
        torch.testing.assert_close(average, torch.stack(history).mean(0))


def test_the_updates_are_sgd_s_with_coupled_weight_decay():
    params = weights()
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = NonMonotoneASGD(params, 5, lr=0.3, weight_decay=0.01, fused=True)
    optimizer.start_averaging()
    for _ in range(4):
        step(optimizer, params)
        for p, q in zip(params, plain, strict=True):
            q.data -= 0.3 * (p.grad + 0.01 * q)
            torch.testing.assert_close(p.detach(), q.detach())


def test_the_exponential_average_begins_after_its_share_and_starts_as_a_mean():
    params = weights()
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = AveragedAdamW(params, decay=0.75, average_after=3, lr=0.1, weight_decay=0.1, fused=True)
    other = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.1)
    expected = None
    for i in range(12):
        iterate = step(optimizer, params)
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad.clone()
        other.step()
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, msg="the updates are AdamW's")
        if i < 3:
            assert "average" not in optimizer.state[params[0]]
            continue
        k = i - 2
        rate = max(1 / k, 0.25)
        expected = iterate[0] if expected is None else expected + rate * (iterate[0] - expected)
        torch.testing.assert_close(optimizer.state[params[0]]["average"], expected)


def test_a_weight_without_gradient_at_first_joins_when_it_moves():
    """An adaptive softmax's cluster may go without; its average is of all iterates even so."""
    params = weights()
    optimizer = AveragedAdamW(params, decay=1.0, average_after=0, lr=0.1, fused=True)
    still = params[1].detach().clone()
    step(optimizer, params[:1])
    optimizer.exchange(True)
    assert torch.equal(params[1], still)
    optimizer.exchange(False)
    params[0].grad = None
    second = step(optimizer, params)[1]
    torch.testing.assert_close(optimizer.state[params[1]]["average"], (still + second) / 2)


def test_exchanging_twice_is_nothing_and_once_is_undone():
    params = weights()
    optimizer = AveragedAdamW(params, average_after=1, lr=0.1, fused=True)
    assert not optimizer.exchange(True), "there is no average yet"
    for _ in range(4):
        raw = step(optimizer, params)
    average = [a.clone() for a in averages(optimizer, params)]
    for _ in range(2):
        optimizer.exchange(True)
        assert all(torch.equal(p, a) for p, a in zip(params, average, strict=True))
    for _ in range(2):
        optimizer.exchange(False)
        assert all(torch.equal(p, r) for p, r in zip(params, raw, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(averages(optimizer, params), average, strict=True))


@pytest.mark.parametrize("at", [1, 3, 4, 6])
@pytest.mark.parametrize("average_in", [False, True])
def test_a_saved_and_restored_run_continues_exactly(at, average_in):
    """Before, at and after the switch, with the average in the model or not."""

    def run(stop):
        torch.manual_seed(0)
        params = weights()
        build = lambda: AveragedAdamW(params, decay=0.8, average_after=3, lr=0.1, fused=True)  # noqa: E731
        optimizer = build()
        for i in range(8):
            if i == stop:
                optimizer.exchange(average_in)
                saved = io.BytesIO()
                torch.save((optimizer.state_dict(), [p.data for p in params]), saved)
                saved.seek(0)
                state, values = torch.load(saved, weights_only=True)
                params = [torch.nn.Parameter(v) for v in values]
                optimizer = build()
                optimizer.load_state_dict(state)
                optimizer.exchange(False)
            step(optimizer, params)
        optimizer.exchange(True)
        return [p.detach() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(at), strict=True))


def test_the_switch_on_a_history():
    params = weights()
    optimizer = NonMonotoneASGD(params, 2, lr=0.1, fused=True)
    switched = []
    for loss in (5.0, 4.0, 4.5, 4.9, 3.9, 4.2, 4.3, 4.1, 1.0):
        optimizer.record(loss)
        switched.append(optimizer.param_groups[0]["averaging"])
    # 4.5 follows two records, none of which is older than the window. 4.9 is below the 5.0 that is. 3.9 is a new
    # minimum. 4.2 is above 4.0, which was reached three validations before: from there on, never back.
    assert switched == [False] * 5 + [True] * 4


def fairseq_optimizer(cls, config, **flags):
    cfg = OmegaConf.structured(config(**{"lr": [1.0], "task_name": None, **flags}))
    return cls(cfg, weights())


def adamw(**flags):
    return fairseq_optimizer(FairseqAveragedAdamW, AveragedAdamWConfig, **{"max_update": 100, **flags})


def nt_asgd(**flags):
    return fairseq_optimizer(FairseqNonMonotoneASGD, NonMonotoneASGDConfig, **flags)


@pytest.mark.parametrize(
    ("build", "flags", "message"),
    [
        (nt_asgd, {"non_monotone_window": 0}, "--non-monotone-window must be at least 1, not 0"),
        (nt_asgd, {"weight_decay": -1.0}, "--weight-decay must be 0 or more"),
        (nt_asgd, {"lr": [-1.0]}, "--lr must be 0 or more"),
        (nt_asgd, {"task_name": "language_modeling"}, "--task language_modeling does not validate the average"),
        (adamw, {"task_name": "language_modeling", "average_last": 0.1}, "--task language_modeling does not validate"),
        (adamw, {"adam_betas": "(0.9,)"}, "--adam-betas must be two numbers"),
        (adamw, {"adam_betas": [0.9, 1.0]}, "--adam-betas must be two numbers within"),
        (adamw, {"adam_eps": 0.0}, "--adam-eps must be above 0"),
        (adamw, {"average_last": 1.5}, "--average-last must lie within"),
        (adamw, {"average_decay": -0.5}, "--average-decay must lie within"),
        (adamw, {"average_last": 0.2, "max_update": 0}, "--average-last is a share of --max-update"),
    ],
)
def test_bad_flags(build, flags, message):
    with pytest.raises(RKMError, match=message):
        build(**flags)


def test_without_an_average_any_task_will_do():
    assert adamw(task_name="sentence_prediction").optimizer.average_after is None


def test_betas():
    assert parse_betas("(0.8, 0.99)") == parse_betas([0.8, 0.99]) == (0.8, 0.99)
    for given in ("__import__('os')", "0.9", 0.9, None, "0.9,0.9,0.9"):
        with pytest.raises(RKMError, match="two numbers"):
            parse_betas(given)


def test_the_share_of_the_run_that_is_averaged():
    optimizer = adamw(average_last=0.2, average_decay=0.99).optimizer
    assert (optimizer.average_after, optimizer.decay) == (80, 0.99)
    assert adamw().optimizer.average_after is None


@pytest.mark.parametrize("build", [adamw, nt_asgd])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping_is_fairseq_s(build, max_norm):
    from fairseq.optim import FairseqOptimizer

    one, other = build(), build()
    for p, q in zip(one.params, other.params, strict=True):
        if torch.cuda.is_available():  # where there is one, fairseq takes it that the weights are on it
            p.data, q.data = p.data.cuda(), q.data.cuda()
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    given, wanted = one.clip_grad_norm(max_norm), FairseqOptimizer.clip_grad_norm(other, max_norm)
    torch.testing.assert_close(given, wanted)
    for p, q in zip(one.params, other.params, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class HalfPrecision:
    """As much of fairseq's FP16Optimizer as an exchange needs: a copy of the weights in another precision."""

    def __init__(self, inner):
        self.optimizer, self.fp32_params = inner.optimizer, list(inner.params)
        self.model = [p.detach().bfloat16() for p in self.fp32_params]

    def _sync_fp32_params_to_fp16(self):
        self.model = [p.detach().bfloat16() for p in self.fp32_params]


def test_a_half_precision_model_follows_its_master_weights():
    wrapper = HalfPrecision(adamw(average_last=1.0, average_decay=1.0))
    for _ in range(3):
        raw = step(wrapper.optimizer, wrapper.fp32_params)
    wrapper._sync_fp32_params_to_fp16()
    average = [a.clone() for a in averages(wrapper.optimizer, wrapper.fp32_params)]
    put_average(wrapper, average_in=True)
    assert all(torch.equal(m, a.bfloat16()) for m, a in zip(wrapper.model, average, strict=True))
    put_average(wrapper, average_in=False)
    assert all(torch.equal(m, r.bfloat16()) for m, r in zip(wrapper.model, raw, strict=True))


def test_fairseq_s_cosine_schedule_is_one_cycle():
    """The fast recipe's: linear over the first tenth, then half a cosine to zero."""
    import math

    from fairseq.optim.lr_scheduler.cosine_lr_scheduler import CosineLRSchedule, CosineLRScheduleConfig

    cfg = OmegaConf.structured(CosineLRScheduleConfig(warmup_updates=50, lr=[0.008], max_update=500))
    schedule = CosineLRSchedule(cfg, adamw())
    for update in range(500):
        q = update / 500
        expected = q / 0.1 if q < 0.1 else 0.5 * (1 + math.cos(math.pi * (q - 0.1) / 0.9))
        assert schedule.step_update(update) == pytest.approx(0.008 * expected, abs=1e-9)
        assert schedule.optimizer.get_lr() == pytest.approx(0.008 * expected, abs=1e-9)
