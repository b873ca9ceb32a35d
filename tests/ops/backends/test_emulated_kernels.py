"""The kernels of ``blockwise``, in one direction and in both at once, run without a GPU (``cuda_emulation.py``)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, forward_and_gradients, join_scales, random_mask, randomized

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.ops import dispatch, two_directions
from fairseq_rkm.ops.backends.blockwise import blockwise
from fairseq_rkm.ops.compilation import nvrtc
from ops.backends.cuda_emulation import NEEDS_COMPILER, EmulatedKernel
from ops.test_backends import problem

PROCESSORS = 6
FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
LAYERS = [
    {"num_layers": 2, "mask": "mixed", "dropout": 0.3},
    {"ngram": 2, "learn_sigma": True, "mask": "mixed"},
    {"ngram": 3, "ngram_padding": "same", "bias": False, "mask": "mixed"},
    {"mask": "none"},
]


@pytest.fixture
def kernels(monkeypatch):
    """A machine that seems to have a GPU; the kernels that were compiled for it."""
    made = []

    def compile_kernel(source, name, macros, *_arguments, **_options):
        made.append(EmulatedKernel(source, name, macros))
        return made[-1]

    properties = SimpleNamespace(multi_processor_count=PROCESSORS, shared_memory_per_block_optin=232_448, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    caches = blockwise._prepare, blockwise._kernel, blockwise._room, blockwise._rows_for
    for cache in caches:
        cache.cache_clear()
    taken = replace(dispatch.BACKENDS["blockwise"], refuses=lambda *_: None)
    monkeypatch.setattr(dispatch, "BACKENDS", {**dispatch.BACKENDS, "blockwise": taken})
    monkeypatch.setattr(dispatch, "_PROVEN", {})
    monkeypatch.setattr(two_directions, "_PROVEN", {})
    monkeypatch.setattr(two_directions, "runs_at_once", lambda *_: True)
    yield made
    for cache in caches:
        cache.cache_clear()


CASES = [(cell, LAYERS, True, 13) for cell in FEEDBACK]
CASES += [("rkm_lstm", LAYERS[:1], True, 3), ("rkm_lstm", LAYERS[:1], False, 13), ("ran", LAYERS[-1:], False, 3)]


@NEEDS_COMPILER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("cell", "layers", "bidirectional", "batch"), CASES)
def test_outputs_states_and_gradients(cell, layers, bidirectional, batch, kernels):
    directions = 1 + bidirectional
    for given in layers:
        options = {**given, "cell": cell, "bidirectional": bidirectional}
        padding = options.pop("mask")
        rkm = randomized(RKM(6, 5, backend="blockwise", **options))
        exact = RKM(6, 5, backend="reference", dtype=torch.float64, **options)
        exact.load_state_dict(rkm.state_dict())
        x, hidden, memory, context = problem(rkm, 7, batch, torch.float32)
        runs = []
        for layer, dtype in ((rkm, torch.float32), (exact, torch.float64)):
            torch.manual_seed(0)
            before = context and [tensor.to(dtype) for tensor in context]
            numbers = [tensor.to(dtype) for tensor in (x, hidden, memory)]
            runs.append(join_scales(forward_and_gradients(layer, *numbers, before, random_mask(padding, batch, 7))))
        for name, result in runs[0].items():
            assert_close(result, runs[1][name], f"{name}, {options}")
    assert {kernel.macros["DIRECTIONS"] for kernel in kernels} == {directions}
    for kernel in kernels:
        rows = kernel.macros["ROWS"]
        assert set(kernel.blocks) == {directions * -(-batch // rows)}
        assert kernel.blocks[0] <= PROCESSORS
        assert rows == 1 or directions * -(-2 * batch // rows) > PROCESSORS
