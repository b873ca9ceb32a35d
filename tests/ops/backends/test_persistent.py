"""What ``persistent`` alone is tested for, on a GPU; the rest: ``test_feedback_kernels.py``."""

import pytest
import torch

from fairseq_rkm.ops.backends.persistent import launch, persistent, plan
from ops.test_backends import compare


@pytest.fixture
def spread(monkeypatch):
    """Have plans of so many groups, each of up to so many rows, whatever the batch, with clusters of a given size."""

    def force(groups, rows, cluster, single):
        def plan_for(problem):
            return plan.make_plan.__wrapped__(
                len(problem.cell.recurrent_gates), problem.size, 8 * groups, problem.dtype.itemsize, problem.norm,
                room=((cluster, 80),), shared=99_000,
            )  # fmt: skip

        for module in (plan, launch, persistent):
            monkeypatch.setattr(module, "plan_for", plan_for)
        if single:  # as many passes as there are tiles
            arrange = plan._arrange
            monkeypatch.setattr(plan, "_arrange", lambda *a: (k := arrange(*a)) and k._replace(pass_tiles=1))
        monkeypatch.setattr(plan, "_row_choices", lambda _, tried: [rows] if tried == groups else [])
        launch.prepare.cache_clear()

    yield force
    launch.prepare.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("groups", "rows", "cluster", "single"),
    [(3, 8, 1, False), (7, 20, 1, True), (1, 24, 2, True), (4, 20, 4, False), (2, 8, 8, False), (2, 40, 4, True)],
)
@pytest.mark.parametrize(("cell", "mask"), [("rkm_lstm", "none"), ("linear_kernel_gated", "mixed")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_plan_takes_any_batch(spread, groups, rows, cluster, single, cell, mask, dtype, layer_norm):
    """Among them such that leave groups or passes without rows, and such that take up to four launches."""
    if cluster > 1 and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters of blocks need compute capability 9.0")
    spread(groups, rows, cluster, single)
    for batch in (*range(1, 10), 15, 17, 33, 49, 65, 81):
        compare(
            "persistent", device="cuda", dtype=dtype, cell=cell, layer_norm=layer_norm, mask=mask, steps=6, batch=batch,
            sizes=(4, 21), learn_sigma=True, tf32=True,
        )  # fmt: skip
