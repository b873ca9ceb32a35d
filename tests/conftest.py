import sys
from pathlib import Path

import pytest
import torch

import fairseq_rkm

sys.path.insert(0, str(Path(__file__).parent))
fairseq_rkm.register()


def pytest_runtest_setup(item):
    """Tests marked ``gpu``, or ``gpu(count=2)``, are skipped where there are not so many."""
    for mark in item.iter_markers("gpu"):
        wanted = mark.kwargs.get("count", 1)
        if torch.cuda.device_count() < wanted:
            pytest.skip(f"needs {wanted} GPU{'s' * (wanted > 1)}, and here are {torch.cuda.device_count()}")


@pytest.fixture
def poisoned():
    """Fill all memory that is allocated uninitialised with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
