"""A few steps without gradients: what the host gives the kernel of a whole step, on a CPU, and who takes which steps.

A stand-in takes the kernel's place. It reads memory by the kernel's arguments, and computes by the reference.
"""

import ctypes

import pytest
import torch
from helpers import assert_close, randomized

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.modules.short_calls import layer_weights
from fairseq_rkm.ops import few_steps, reference
from fairseq_rkm.ops.backends.native import native, native_steps
from fairseq_rkm.ops.cells import resolve_cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.weights import Weights


def at(address, rows, columns, stride=None):
    """Numbers in memory; None where there are none."""
    if not address:
        return None
    stride = columns if stride is None else stride
    flat = (ctypes.c_float * ((rows - 1) * stride + columns)).from_address(address)
    return torch.frombuffer(flat, dtype=torch.float32).as_strided((rows, columns), (stride, 1))


class WholeStep:
    """``whole_step`` of ``few_steps.cu``."""

    def __init__(self, cell, scales, macros):
        self.cell, self.scales, self.macros = cell, scales, dict(macros)

    def launch(self, blocks, threads, *arguments):
        x, h, before, matrix, recurrent, bias, output, hidden, memory, *numbers = arguments
        x_row, h_row, output_row, features, size, batch = numbers
        rows, width = self.macros["ROWS"], 4 * self.macros["WIDTH"]
        assert threads == self.macros["THREADS"]
        assert blocks >= -(-batch // rows) * -(-size // (threads // 32))
        read = (x, 4 * x_row, matrix, 4 * features, *((h, 4 * h_row, recurrent, 4 * size) if recurrent else ()))
        assert not any(number % width for number in read)
        weights = Weights(
            at(matrix, len(self.cell.gates) * size, features),
            at(recurrent, len(self.cell.recurrent_gates) * size, size),
            None if not bias else at(bias, 1, len(self.cell.gates) * size)[0],
            None, None, *self.scales,
        )  # fmt: skip
        zeros = torch.zeros(batch, size)
        h, before = at(h, batch, size, h_row), at(before, batch, size)
        h, c = reference.step(
            self.cell, at(x, batch, features, x_row), weights, zeros if h is None else h,
            zeros if before is None else before,
        )  # fmt: skip
        at(output, batch, size, output_row)[:], at(memory, batch, size)[:] = h, c
        if hidden:
            at(hidden, batch, size)[:] = h


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", CELLS)
def test_a_launch_a_layer_and_step(cell, monkeypatch):
    few_steps._whole_step.cache_clear()
    few_steps._kernel.cache_clear()
    monkeypatch.setattr(
        nvrtc, "compile_kernel", lambda _source, _name, macros, *_, **__: WholeStep(rkm._cell, (0.3, 0.8), macros)
    )
    for features, size, batch, steps, layers, batch_first, given in (
        (3, 5, 4, 1, 1, False, True), (8, 4, 1, 3, 1, True, False), (3, 4, 18, 4, 3, True, True),
        (8, 5, 2, 2, 2, False, True), (6, 6, 3, 2, 2, False, False),
    ):  # fmt: skip
        options = {"cell": cell, "batch_first": batch_first, "bias": batch != 2, "sigma_i2": 0.3, "sigma_f2": 0.8}
        rkm = randomized(RKM(features, size, layers, **options))
        exact = RKM(features, size, layers, **options, backend="reference")
        exact.load_state_dict(rkm.state_dict())
        x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), features)
        state = rkm.initial_state(batch).map(torch.randn_like) if given else None
        with torch.no_grad():
            all_weights = [layer_weights(rkm, layer) for layer in range(layers)]
            found = few_steps._by_kernel(rkm._cell, x, all_weights, *(state or (None, None)), batch_first)
            output, after = exact(x, state)
        for name, a, b in zip(("output", "h", "c"), found, (output, *after), strict=True):
            assert_close(a, b, f"{name} of {features, size, batch, steps, layers}")
    few_steps._whole_step.cache_clear()
    few_steps._kernel.cache_clear()


def test_who_takes_which_steps(monkeypatch):
    monkeypatch.setattr(nvrtc, "available", lambda: None)
    cell, way_for = resolve_cell("rkm_lstm"), few_steps.way_for.__wrapped__
    float32, float16, float64 = torch.float32, torch.float16, torch.float64
    for shape, batch_first, size, dtype, norm, wanted in (
        ((1, 8, 64), False, 64, float32, False, few_steps._by_kernel),
        ((8, 8, 64), False, 64, float16, False, few_steps._by_kernel),
        ((8, 4, 64), True, 64, float32, False, few_steps._by_kernel),
        ((9, 8, 64), False, 64, float32, False, few_steps._by_backend),
        ((0, 8, 64), False, 64, float32, False, None),
        ((1, 0, 64), False, 64, float32, False, None),
        ((1, 64, 512), False, 512, float32, False, few_steps._by_kernel),
        ((1, 64, 1150), False, 1150, float32, False, few_steps._by_products),
        ((1, 40_000, 4), False, 4, float32, False, few_steps._by_kernel),
        ((1, 160_000, 4), False, 4, float32, False, few_steps._by_products),
        ((3, 64, 1150), False, 1150, float32, False, few_steps._by_products),
        ((4, 64, 1150), False, 1150, float32, False, few_steps._by_backend),
        ((1, 8, 64), False, 64, float64, False, few_steps._by_operators),
        ((2, 8, 64), False, 64, float64, False, None),
        ((1, 8, 64), False, 64, float32, True, few_steps._by_operators),
        ((2, 8, 64), False, 64, float32, True, few_steps._by_backend),
        ((1, 8, 64), False, 64, float16, True, None),
        ((1, 8, 64), False, 64, torch.int64, False, None),
    ):
        assert way_for(cell, 1, shape, batch_first, size, dtype, True, norm) is wanted, (shape, size, dtype, norm)
    assert way_for(cell, 2, (16, 8, 64), False, 64, float32, True, False) is few_steps._by_backend
    assert way_for(cell, 2, (17, 8, 64), False, 64, float32, True, False) is None
    monkeypatch.setattr(native_steps, "_missing", lambda _: "no compiler")
    assert way_for(cell, 1, (1, 8, 64), False, 64, float32, False, False) is few_steps._by_operators
    assert way_for(cell, 1, (2, 8, 64), False, 64, float32, False, False) is None
    monkeypatch.setattr(native_steps, "_missing", lambda _: None)
    for norm in (False, True):
        assert way_for(cell, 1, (16, 8, 64), False, 64, float32, False, norm) is native_steps.run
        assert way_for(cell, 1, (17, 8, 64), False, 64, float32, False, norm) is None
        assert way_for(cell, 1, (2, 2000, 64), False, 512, float32, False, norm) is None
        assert way_for(cell, 1, (1, 4000, 64), False, 512, float32, False, norm) is native_steps.run


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", ["_by_backend", "_by_products"])
def test_steps_by_a_backend_and_by_products(way, layers, batch_first, monkeypatch):
    """A CPU's step by operators stands in for a GPU's by products."""
    monkeypatch.setattr(few_steps, "_step_by_products", few_steps._step_by_operators)
    rkm = randomized(RKM(3, 4, layers, batch_first=batch_first))
    exact = RKM(3, 4, layers, batch_first=batch_first, backend="reference")
    exact.load_state_dict(rkm.state_dict())
    x, state = torch.randn(5, 6, 3), None
    all_weights = [layer_weights(rkm, layer) for layer in range(layers)]
    for _ in range(2):
        with torch.no_grad():
            found = getattr(few_steps, way)(rkm._cell, x, all_weights, *(state or (None, None)), batch_first)
            output, state = exact(x, state)
        for name, a, b in zip(("output", "h", "c"), found, (output, *state), strict=True):
            assert_close(a, b, name)


@pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
def test_c_without_memory_says_so(monkeypatch):
    rkm = RKM(3, 4)
    monkeypatch.setattr(native_steps, "_function", lambda *_: lambda *_: 0)
    with torch.no_grad(), pytest.raises(MemoryError, match="2 steps of 5 sequences and 4 units"):
        rkm(torch.randn(2, 5, 3))


@pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
def test_threads_come_with_the_work_and_change_no_bit(monkeypatch):
    rkm, seen, results = RKM(8, 64), [], []
    function = native_steps._function
    monkeypatch.setattr(
        native_steps, "_function", lambda *of: lambda *given: seen.append(given[3]) or function(*of)(*given)
    )
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023 - called at once
        with torch.no_grad():
            results.append([rkm(torch.ones(steps, batch, 8))[0] for steps, batch in ((1, 1), (2, 1), (16, 64))])
    assert seen == [1, 1, 1, 1, 1, 3]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(native._missing(CELLS["rkm_lstm"]) is not None, reason="needs a C compiler")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_c_takes_steps_at_once_or_one_by_one(cell, large, monkeypatch):
    monkeypatch.setattr(native_steps, "LARGE_WEIGHTS", 0 if large else 1 << 30)
    for layer_norm, batch_first, batch, given in (
        (False, False, 2, True),
        (True, True, 1, True),
        (True, False, 3, False),
    ):
        options = {"cell": cell, "layer_norm": layer_norm, "batch_first": batch_first}
        rkm, exact = randomized(RKM(3, 20, 2, **options)), RKM(3, 20, 2, **options, backend="reference")
        exact.load_state_dict(rkm.state_dict())
        x = torch.randn(*((batch, 4) if batch_first else (4, batch)), 3)
        state = rkm.initial_state(batch).map(torch.randn_like) if given else None
        with torch.no_grad():
            all_weights = [layer_weights(rkm, layer) for layer in range(2)]
            found = native_steps.run(rkm._cell, x, all_weights, *(state or (None, None)), batch_first)
            output, after = exact(x, state)
        for name, a, b in zip(("output", "h", "c"), found, (output, *after), strict=True):
            assert_close(a, b, f"{name} of {options}")
    if rkm.feedback:
        assert native_steps._at_once(rkm._cell, 4, 2, 20) == (1 if large else 4)
