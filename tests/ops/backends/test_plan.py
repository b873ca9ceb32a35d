"""The persistent kernels' plans: no GPU needed."""

import itertools
import math

import pytest
import torch

from fairseq_rkm import CELLS
from fairseq_rkm.ops.backends.persistent.launch import FEW_FENCES, MANY_FENCES, ring_of
from fairseq_rkm.ops.backends.persistent.plan import Plan, Problem, make_plan
from fairseq_rkm.ops.batch_rounding import round_up
from fairseq_rkm.ops.weights import Weights


@pytest.mark.slow
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("room", [((1, 132),), ((1, 132), (2, 132), (4, 128), (8, 120))])
def test_plans_never_ask_for_more_than_the_chip_has(element, norm, room):
    shared = 232_448
    planned = 0
    for recurrent, size, batch in itertools.product((1, 2, 4), (1, 7, 64, 300, 650, 1150, 3000), (1, 20, 80, 999)):
        plan = make_plan(recurrent, size, batch, element, norm, room, shared)
        if plan is None:
            assert recurrent * size * size * element > 0.5 * 132 * shared or size > 1000
            continue
        planned += 1
        cluster = plan.backward.cluster
        assert plan.forward.cluster == 1
        assert plan.slices % cluster == 0
        assert plan.groups * plan.slices <= dict(room)[cluster]
        assert max(plan.forward.shared, plan.backward.shared) <= shared
        for k, m, launch in (
            (plan.slices * plan.units, recurrent * plan.units, plan.forward),
            (plan.slices // cluster * recurrent * plan.units, cluster * plan.units, plan.backward),
        ):
            share = math.ceil(math.ceil(k * element / 64) / launch.warps)
            assert launch.held <= share * math.ceil(m / 16)
            assert not launch.held or launch.vectors == share * math.ceil(plan.rows / 8), (
                "all of a share is under way at once"
            )
        assert plan.units * plan.slices >= size > plan.units * (plan.slices - 2 * cluster)
        assert plan.units * plan.slices * element % 16 == 0
        assert plan.units * plan.slices // cluster * recurrent * element % 16 == 0
        assert plan.units * element % (4 * plan.words) == 0
        assert plan.rows * plan.groups * plan.launches(batch) >= batch
    assert planned > 40


def test_batches_share_few_plans():
    weights, problems = Weights(torch.empty(20, 3), torch.empty(20, 5)), {}
    for batch in range(1, 2001):
        problem = Problem.of(CELLS["rkm_lstm"], torch.empty(1, batch, 3), weights)
        problems[problem] = problem.batch
        assert problem.batch % 8 == 0
        assert batch <= problem.batch < batch + max(8, batch / 4)
        assert round_up(problem.batch) == problem.batch
    assert len(problems) == 28
    assert list(problems.values())[6:13] == [56, 64, 80, 96, 112, 128, 160]


def test_groups_have_rows_for_the_whole_batch_and_no_launch_is_empty():
    for groups, rows, batch in itertools.product((1, 2, 3, 7), (1, 8, 20), range(1, 300)):
        plan = Plan(4, 2, 1, groups, rows, None, None, 1.0)
        launches, share = plan.launches(batch), plan.rows_for(batch)
        assert share <= rows
        assert (launches - 1) * groups * share < batch <= launches * groups * share


@pytest.mark.parametrize(
    ("size", "batch", "ring"),
    [(512, 8, FEW_FENCES), (1024, 1, FEW_FENCES), (1536, 32, FEW_FENCES), (1536, 8, MANY_FENCES)],
)
def test_blocks_fence_as_often_as_was_measured_to_be_best(size, batch, ring):
    plan = make_plan(4, size, batch, 2, False, ((1, 132), (2, 132), (4, 128), (8, 120)), 232_448)
    assert plan is not None
    assert ring_of(plan) is ring
