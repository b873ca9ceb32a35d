import pytest
import torch
from torch.nn import functional as F

from fairseq_rkm.ops.ngram import extend, last_real_step, next_context, project, project_backward


@pytest.mark.parametrize(("ngram", "padding"), [(1, "causal"), (2, "causal"), (3, "same"), (5, "same"), (7, "causal")])
def test_projection_is_a_convolution(ngram, padding):
    x, weight, bias = torch.randn(4, 3, 2), torch.randn(6, ngram * 2), torch.randn(6)
    given = project(extend(x, ngram, padding, None), weight, bias)
    # conv1d's kernel runs from the oldest input to the newest, ours the other way.
    kernel = weight.view(6, ngram, 2).flip(1).permute(0, 2, 1)
    left = ngram - 1 if padding == "causal" else (ngram - 1) // 2
    padded = F.pad(x.permute(1, 2, 0), (left, ngram - 1 - left))
    torch.testing.assert_close(given, F.conv1d(padded, kernel, bias).permute(2, 0, 1))


def test_backward_is_autograd_s():
    inputs = torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3 * 2, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 3, 5, dtype=torch.float64)
    windows = torch.cat([inputs[2:], inputs[1:5], inputs[:4]], dim=-1)
    wanted = torch.autograd.grad((F.linear(windows, weight) * grad).sum(), [inputs, weight])
    given = project_backward(grad, inputs.detach(), weight.detach(), need_inputs=True, need_weight=True)
    for g, w in zip(given, wanted, strict=True):
        torch.testing.assert_close(g, w)
    assert project_backward(grad, inputs, weight, need_inputs=False, need_weight=False) == (None, None)


def test_context_is_what_came_last_before_trailing_padding():
    x = torch.arange(1.0, 7.0).view(6, 1, 1).expand(6, 3, 1).clone()
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool().t()
    x = x * keep.unsqueeze(-1)
    before = torch.tensor([[[-2.0]] * 3, [[-1.0]] * 3]).view(2, 3, 1)
    context = next_context(x, 3, before, keep)
    assert context.squeeze(-1).t().tolist() == [[5, 6], [1, 2], [-2, -1]]
    assert next_context(x, 3, before, None).squeeze(-1).t().tolist() == [[5, 6], [0, 0], [0, 0]]


def test_last_real_step():
    keep = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool().t()
    assert last_real_step(keep).tolist() == [2, 3, 1, 0]
