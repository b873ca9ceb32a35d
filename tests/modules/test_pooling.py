import pytest
import torch
from helpers import assert_close, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.modules import POOLINGS, log_power, pool


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_over_a_padded_batch_is_pooling_over_each_sequence_alone(kind, bidirectional):
    rkm = RKM(4, 5, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    x, mask = torch.randn(9, 5, 4, dtype=torch.float64), random_mask("mixed", 5, 9)
    output, state = rkm(x, padding_mask=mask)
    pooled = pool(kind, output, state.hidden, mask)
    assert pooled.shape == (5, 10 if bidirectional else 5)
    for row in range(4):
        alone, _ = rkm(x[~mask[row], row : row + 1])
        ends = torch.cat([alone[-1:, :, :5], alone[:1, :, 5:]], dim=-1)
        wanted = {"mean": alone.mean(0), "max": alone.amax(0), "last": ends[0]}[kind]
        assert_close(pooled[row : row + 1], wanted, f"row {row}")
    assert pooled[4].eq(0).all(), "nothing but padding"


def test_the_mean_of_many_steps_does_not_overflow_16_bits():
    output = torch.full((20_000, 1, 3), 100.0, dtype=torch.float16)
    mask = torch.zeros(1, 20_000, dtype=torch.bool)
    assert pool("mean", output, output[-1:], mask).eq(100).all()


def test_an_unknown_pooling_is_refused():
    with pytest.raises(RKMError, match="unknown pooling 'sum'; choose one of mean, max, last"):
        pool("sum", torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.bool))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 4))
def test_power_is_the_log_of_the_variance_of_real_steps(steps, extra):
    output = torch.randn(steps + extra, 2, 3, dtype=torch.float64)
    mask = torch.arange(steps + extra).expand(2, -1) >= steps
    wanted = (output[:steps].var(0, correction=0) + 1e-6).log()
    assert torch.allclose(log_power(output, mask), wanted, atol=1e-9)
    assert log_power(output, torch.ones_like(mask)).isfinite().all()
    assert log_power(100 * output.bfloat16(), mask).isfinite().all()
