import math

import pytest
import torch

from fairseq_rkm import RKM
from fairseq_rkm.experiments.recurrence_benchmark import largest, largest_error


def test_an_error_that_is_no_number_is_the_largest():
    assert largest([0.1, 0.3, 0.2]) == pytest.approx(0.3)
    for place in range(3):
        errors = [0.1, 0.3]
        errors.insert(place, math.nan)
        assert math.isnan(largest(errors))


@pytest.mark.parametrize("steps", [2, 4])
def test_results_in_float16_are_right_however_many_they_are(steps):
    """65,536 of them and more, which float16 cannot count."""
    torch.manual_seed(0)
    rkm = RKM(4, 64, feedback=False, backend="batched", dtype=torch.float16)
    assert largest_error(rkm, torch.randn(steps, 512, 4, dtype=torch.float16) / 4) < 1e-2
