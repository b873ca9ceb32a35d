"""Candidates in one launch against those by PyTorch: on a GPU, or in the interpreter.

The last test of ``backends/test_stepwise_candidates.py`` runs these in the interpreter.
"""

import pytest
import torch
from helpers import assert_close, join_scales

from fairseq_rkm.ops import kernel_candidates, pointwise_candidates
from fairseq_rkm.ops.cells import resolve_cell
from fairseq_rkm.ops.kernel_functions import KERNELS, resolve_kernel
from fairseq_rkm.ops.passes import Saved
from fairseq_rkm.ops.weights import Weights, memory_dtype
from ops.backends.triton_interpreter import DEVICE, INTERPRETED

ALL = [row for rows in KERNELS.values() for row in rows if not row.is_linear and (row.degree or 0) <= 3]
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def layer(kernel, size, features, dtype, ngram=2, scale=1.5):
    """A cell without feedback, with learned sigmas, and its weights."""
    cell = resolve_cell("linear_kernel_gated", feedback=False).through(kernel)
    width = len(cell.gates) * size
    weights = Weights(
        torch.randn(width, ngram * features) / features**0.5, None, torch.randn(width), None, None, torch.tensor(0.4),
        torch.rand(size),
        *(torch.rand(size) + scale if name in kernel.parameters else None for name in ("scale", "offset")),
    )  # fmt: skip
    return cell, Weights(*(None if tensor is None else tensor.to(DEVICE, dtype) for tensor in weights))


def results(cell, weights, inputs, gates, grads, memory):
    """The candidates, the gradients of ``w^T X_t``, and all others."""
    gates, grads = gates.clone(), grads.clone()
    kernel_candidates.take_candidates(cell, weights, inputs, gates)
    saved = Saved(cell, None, inputs, None, None, weights, ())
    needs = (True, True, False, True, False, False, True, True, True, True)
    found = kernel_candidates.gradients_of_taken(saved, memory, memory, gates, grads, {}, needs)
    names = ("inputs", *Weights._fields)
    kept = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    return join_scales({"gates": gates, "grad_gates": grads, **kept})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ALL, ids=lambda row: row.key)
def test_candidates_and_all_gradients(kernel, dtype, monkeypatch):
    """Sizes that fill no block, and more rows and units than one program takes."""
    monkeypatch.setattr(pointwise_candidates, "MOST_PROGRAMS", 12)
    monkeypatch.setattr(pointwise_candidates, "MOST_UNITS_AT_ONCE", 16)
    for steps, batch, features, size in ((1, 1, 3, 5), (7, 3, 4, 37)):
        cell, weights = layer(kernel, size, features, dtype)
        inputs = torch.randn(steps + 1, batch, features, device=DEVICE).to(dtype)
        gates, grads = (torch.randn(steps, batch, len(cell.gates) * size, device=DEVICE).to(dtype) for _ in range(2))
        memory = torch.randn(steps + 1, batch, size, device=DEVICE, dtype=memory_dtype(dtype))
        given = results(cell, weights, inputs, gates, grads, memory)
        with monkeypatch.context() as patch:
            patch.setattr(pointwise_candidates, "takes", lambda _gates: False)
            wanted = results(cell, weights, inputs, gates, grads, memory)
        assert given.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_close(given[name], value, f"{kernel.key} {steps, batch, size} {name}", dtype)


@pytest.mark.parametrize("extreme", [0.0, 1e-30, 1e4])
@pytest.mark.parametrize("kernel", ALL, ids=lambda row: row.key)
def test_extreme_windows_give_numbers(kernel, extreme):
    cell, weights = layer(kernel, 9, 4, torch.float32, scale=20.0)
    inputs = torch.randn(4, 2, 4, device=DEVICE) * extreme
    gates = torch.randn(3, 2, len(cell.gates) * 9, device=DEVICE) * extreme
    memory = torch.randn(4, 2, 9, device=DEVICE)
    for name, value in results(cell, weights, inputs, gates, torch.ones_like(gates), memory).items():
        assert value.isfinite().all(), name


def test_float64_and_empty_tensors_go_through_pytorch():
    gates = torch.zeros(2, 3, 4, device=DEVICE)
    assert pointwise_candidates.takes(gates)
    for other in (gates.double(), gates[:0], gates.transpose(0, 1)):
        assert not pointwise_candidates.takes(other)
    assert not pointwise_candidates.reads_windows(resolve_kernel("polynomial"))
    assert pointwise_candidates.reads_windows(resolve_kernel("gaussian"))
