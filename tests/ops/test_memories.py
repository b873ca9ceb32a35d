"""All memories against the definition: the memory after a step is the final one of the sequence up to it."""

import pytest
import torch
from helpers import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_rkm.ops import anew
from fairseq_rkm.ops.memories import memories
from fairseq_rkm.ops.ngram import extend, steps_ahead, windows
from fairseq_rkm.ops.segments import Reset
from ops.test_segments import D, compare, leaves_of, problems, random_problem, weights_of, with_gradients


def arguments_of(problem, leaves, weights):
    """The arguments of a recurrence up to the mask, and those behind the backend."""
    n, padding = problem["ngram"], problem["padding"]
    inputs = extend(leaves["x"], n, padding, leaves["context"])
    fresh = leaves["fresh_hidden"], leaves["fresh_memory"]
    common = problem["cell"], inputs, weights, D, leaves["hidden"], leaves["memory"], problem["keep"]
    return common, (Reset(problem["reset"]), fresh, steps_ahead(n, padding))


def by(backend):
    def run(problem, leaves, weights):
        common, more = arguments_of(problem, leaves, weights)
        output, *final = anew.recurrence(*common, backend, *more)
        given_ = memories(output, *common, backend, *more)
        return output, *final, given_

    return run


def step_by_step(problem, leaves, weights):
    (cell, inputs, *rest, keep), (reset, fresh, ahead) = arguments_of(problem, leaves, weights)
    output, *final = anew.recurrence(cell, inputs, *rest, keep, "reference", reset, fresh, ahead)
    written_out = windows(inputs, problem["ngram"], ahead, reset.mask)
    found = []
    for steps in range(1, len(reset.mask) + 1):
        real = None if keep is None else keep[:steps]
        upto = cell, written_out[:steps], *rest, real, "reference", Reset(reset.mask[:steps]), fresh
        memory = anew.recurrence(*upto)[2]
        found.append(memory if real is None else memory * real[-1].unsqueeze(1))
    return output, *final, torch.stack(found) if found else output


@given(problem=problems(), clip=st.sampled_from([None, 0.7]))
@settings(max_examples=150, deadline=None)
def test_memories_and_their_gradients_are_those_of_single_steps(problem, clip):
    problem["cell"] = problem["cell"].clipped(None if problem["layer_norm"] else clip)
    for backend in ("auto", "reference"):
        compare(with_gradients(problem, by(backend)), with_gradients(problem, step_by_step))


@pytest.mark.gpu
@given(problem=problems())
@settings(max_examples=30, deadline=None)
def test_memories_on_a_gpu_are_those_of_single_steps(problem):
    compare(with_gradients(problem, by("auto"), "cuda"), with_gradients(problem, step_by_step))


@pytest.mark.parametrize("device", DEVICES)
def test_memories_of_16_bit_models_are_not_rounded_to_16(device):
    problem = random_problem(9, 3, 0.3)
    leaves = {n: v if v is None else v.detach().to(device, torch.bfloat16) for n, v in leaves_of(problem).items()}
    weights = weights_of(leaves)
    moved = problem | {"reset": problem["reset"].to(device)}
    *_, final, given_ = by("auto")(moved, leaves, weights)
    assert given_.dtype == final.dtype == torch.float32
    assert (given_[-1] - final).norm() < 3e-2 * final.norm()
    assert not torch.equal(given_, given_.bfloat16().float())
