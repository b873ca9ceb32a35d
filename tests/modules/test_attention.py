import pytest
import torch
from helpers import assert_close

from fairseq_rkm.modules import GlobalAttention


def test_against_the_equations_written_out():
    attention = GlobalAttention(4, 6, 5).double()
    query, source = torch.randn(3, 2, 4).double(), torch.randn(7, 2, 6).double()
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    output, weights = attention(query, source, mask)
    for t in range(3):
        for b, length in enumerate((7, 5)):
            states = source[:length, b]
            scores = states @ (attention.score.weight @ query[t, b])
            share = scores.exp() / scores.exp().sum()
            assert_close(weights[b, t, :length], share)
            assert (weights[b, t, length:] == 0).all()
            both = torch.cat([share @ states, query[t, b]])
            assert_close(output[t, b], torch.tanh(attention.combine.weight @ both))


def test_beams_share_their_sentence():
    attention = GlobalAttention(4, 6, 5).double()
    query, source = torch.randn(3, 8, 4).double(), torch.randn(7, 2, 6).double()
    mask = torch.arange(7) >= torch.tensor([[7], [5]])
    shared = attention(query, source, mask)
    alone = attention(query, source.repeat_interleave(4, dim=1), mask.repeat_interleave(4, dim=0))
    for given, wanted in zip(shared, alone, strict=True):
        assert_close(given, wanted)


def test_a_source_of_padding_alone_gives_no_nan():
    attention = GlobalAttention(4, 6, 5)
    output, weights = attention(torch.randn(3, 1, 4), torch.zeros(2, 1, 6), torch.ones(1, 2, dtype=torch.bool))
    assert output.isfinite().all()
    assert weights.isfinite().all()


@pytest.mark.parametrize("missing", [torch.nan, torch.inf])
def test_missing_numbers_at_padding_are_not_read(missing):
    attention = GlobalAttention(4, 5, 6)
    query, source = torch.randn(3, 2, 4, requires_grad=True), torch.randn(7, 2, 5)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    results = []
    for fill in (0.0, missing):
        padded = source.masked_fill(mask.t().unsqueeze(-1), fill).requires_grad_()
        output, weights = attention(query, padded, mask)
        leaves = [query, padded, *attention.parameters()]
        results.append([output, weights, *torch.autograd.grad(output.sum(), leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
