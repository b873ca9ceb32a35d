"""A few steps without gradients: the kernels of a step, run without a GPU, and the ways of all problems."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, randomized

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.modules.short_calls import layer_weights
from fairseq_rkm.ops import dispatch, few_steps
from fairseq_rkm.ops.backends.native import native, native_steps
from fairseq_rkm.ops.cells import resolve_cell
from fairseq_rkm.ops.compilation import nvrtc
from ops.backends.cuda_emulation import NEEDS_COMPILER, EmulatedKernel

PROCESSORS = 3


class Emulated(EmulatedKernel):
    """A kernel of ``few_steps.cu`` that looks at its arguments."""

    def launch(self, blocks, threads, *arguments):
        x, h, _, matrix, recurrent, _, output, *rest = arguments
        width = 4 * self.macros.get("WIDTH", self.macros.get("WORDS"))
        if self.name == "steps_by_warps":
            *_, x_row, x_step, h_row, output_step, features, size, _, _ = rest
            steps = x_step, *((output, output_step) if recurrent else ())
        else:
            *_, x_row, h_row, _, features, size, _ = rest
            steps = ()
        read = (x, matrix, features, x_row, *((h, recurrent, size, h_row) if recurrent else ()), *steps)
        assert not any(number % (width if number > 1 << 20 else width // 4) for number in read)
        assert threads == self.macros["THREADS"]
        super().launch(blocks, threads, *arguments)


@pytest.fixture
def kernels(monkeypatch):
    """A machine that seems to have a GPU; the kernels that were compiled for it."""
    made, counter = [], torch.zeros(1, dtype=torch.int32)

    def compile_kernel(source, name, macros, _shared, _device, cooperative):
        assert cooperative == (name == "steps_by_warps" and dict(macros)["RECURRENT"] > 0)
        made.append(Emulated(source, name, macros, PROCESSORS if cooperative else None))
        return made[-1]

    properties = SimpleNamespace(multi_processor_count=PROCESSORS, shared_memory_per_block_optin=232_448, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    monkeypatch.setattr(dispatch, "tf32", lambda _: True)
    monkeypatch.setattr(few_steps, "_counter", lambda _: counter)
    caches = few_steps._warps, few_steps._resident_warps, few_steps._tiles, few_steps._kernel
    for cache in caches:
        cache.cache_clear()
    yield made
    assert counter.item() in (0, -(1 << 31)), "the next launch would not meet"
    for cache in caches:
        cache.cache_clear()


STEPS = [
    {"features": 3, "size": 5, "batch": 4, "steps": 1, "layers": 1},
    {"features": 9, "size": 21, "batch": 18, "steps": 4, "layers": 2, "batch_first": True},
    {"features": 5, "size": 21, "batch": 17, "steps": 2, "layers": 1, "given": False},
]


@NEEDS_COMPILER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("cell", "way"),
    [*((cell, "_by_warps") for cell in CELLS), *((cell, "_by_tiles") for cell in ("lstm", "rkm_cifg", "ran", "cnn"))],
)
def test_a_launch_a_layer_and_step(cell, way, kernels):
    for each in STEPS:
        check_steps(cell, way, **each)
    assert {kernel.name for kernel in kernels} == {f"step{way}"}
    assert sum(len(kernel.blocks) for kernel in kernels) == sum(each["layers"] * each["steps"] for each in STEPS)


@NEEDS_COMPILER
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", CELLS)
def test_one_launch_a_layer(cell, kernels):
    """Blocks meet after each step; of 21 units and 18 rows each has more than one share."""
    for each in STEPS[1:]:
        check_steps(cell, "_at_once", **each)
    assert {kernel.name for kernel in kernels} == {"steps_by_warps"}
    assert sum(len(kernel.blocks) for kernel in kernels) == sum(each["layers"] for each in STEPS[1:])


def check_steps(cell, way, features, size, batch, steps, layers, batch_first=False, given=True):
    """Compare a way's outputs and states with the reference's."""
    options = {"cell": cell, "batch_first": batch_first, "bias": batch != 2, "sigma_i2": 0.3, "sigma_f2": 0.8}
    rkm = randomized(RKM(features, size, layers, **options))
    exact = RKM(features, size, layers, **options, backend="reference")
    exact.load_state_dict(rkm.state_dict())
    x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), features)
    state = rkm.initial_state(batch).map(torch.randn_like) if given else None
    with torch.no_grad():
        all_weights = [layer_weights(rkm, layer) for layer in range(layers)]
        found = getattr(few_steps, way)(rkm._cell, x, all_weights, *(state or (None, None)), batch_first)
        output, after = exact(x, state)
    for name, a, b in zip(("output", "h", "c"), found, (output, *after), strict=True):
        assert_close(a, b, f"{name} of {features, size, batch, steps, layers}")


@NEEDS_COMPILER
@pytest.mark.usefixtures("poisoned")
def test_alignments_and_rows(kernels):
    """Words are read one, two or four at a time; warps take 1 to 16 rows, and tiles 8 or more."""
    ways = "_by_warps", "_at_once", "_by_tiles"
    for way, (size, batch) in itertools.product(ways, ((9, 1), (10, 3), (12, 17), (8, 70))):
        check_steps("rkm_lstm", way, size, size, batch, 3, 1)
    for way in ways:  # more than all warps, or lanes, read at a time
        check_steps("rkm_lstm", way, 150, 12, 5, 2, 1)
    names = {"step_by_warps": "warps", "steps_by_warps": "at once", "step_by_tiles": "tiles"}
    seen = {(names[kernel.name], key, kernel.macros[key]) for kernel in kernels for key in kernel.macros}
    assert {("at once", "WIDTH", width) for width in (1, 2, 4)} <= seen
    assert {("at once", "ROWS", rows) for rows in (1, 4, 16)} <= seen
    assert {("warps", "WIDTH", width) for width in (1, 2, 4)} <= seen
    assert {("tiles", "WORDS", width) for width in (1, 2, 4)} <= seen
    assert {("warps", "ROWS", rows) for rows in (1, 4, 16)} <= seen
    assert {("tiles", "ROWS", rows) for rows in (8, 32, 64)} <= seen


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("float32 is not rounded", {"tf32": False}),
        ("more sums than registers", {"size": 40}), ("too little shared memory", {"shared": 1000}),
        ("no such tensor cores", {"major": 7}), ("rows of 2 bytes", {"aligned": 2}),
    ],
)  # fmt: skip
def test_what_tiles_do_not_take_goes_another_way(what, change, kernels, monkeypatch):
    gpu, real = torch.cuda.get_device_properties(0), few_steps._tiles
    gpu.shared_memory_per_block_optin = change.get("shared", gpu.shared_memory_per_block_optin)
    gpu.major = change.get("major", gpu.major)
    monkeypatch.setattr(dispatch, "tf32", lambda _: change.get("tf32", True))
    monkeypatch.setattr(few_steps, "_tiles", lambda *a: real(*a[:6], change.get("aligned", a[6]), *a[7:]))
    monkeypatch.setattr(few_steps, "_step_by_products", few_steps._step_by_operators)
    check_steps("rkm_lstm", "_by_tiles", 4, change.get("size", 8), 3, change.get("steps", 3), 1)
    assert not kernels, what


def test_blocks_meet_at_a_place_of_their_stream_or_graph(monkeypatch):
    stream, captures, current = {0: 7, 1: 7}, {0: False, 1: False}, [0]

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.device, current[0] = current[0], self.device

        def __exit__(self, *_):
            current[0] = self.device

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream.get, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[current[0]])
    monkeypatch.setattr(few_steps, "_COUNTERS", {})
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: (real(size, dtype=dtype), device)[0])
    first = few_steps._counter(0)
    assert first.eq(0).all()
    assert few_steps._counter(0) is first
    assert few_steps._counter(1) is not first
    captures[0] = True
    assert few_steps._counter(0) is not few_steps._counter(0)
    assert few_steps._counter(1) is few_steps._counter(1)
    captures[0], captures[1] = False, True  # of a device that is not the current one
    assert few_steps._counter(1) is not few_steps._counter(1)
    stream[0] = 8
    assert few_steps._counter(0) is not first
    assert len(few_steps._COUNTERS) == 3
    assert current == [0]


def test_who_takes_which_steps(monkeypatch):
    monkeypatch.setattr(nvrtc, "available", lambda: None)
    cell, way_for = resolve_cell("rkm_lstm"), few_steps.way_for.__wrapped__
    float32, float16, float64 = torch.float32, torch.float16, torch.float64
    for shape, batch_first, size, dtype, norm, wanted in (
        ((1, 8, 64), False, 64, float32, False, few_steps._by_warps),
        ((2, 8, 64), False, 64, float16, False, few_steps._at_once),
        ((8, 4, 64), True, 64, float32, False, few_steps._at_once),
        ((4, 64, 256), False, 256, float32, False, few_steps._at_once),
        ((4, 64, 512), False, 512, float32, False, few_steps._by_warps),
        ((9, 8, 64), False, 64, float32, False, few_steps._at_once),
        ((16, 64, 64), False, 64, float16, False, few_steps._at_once),
        ((17, 8, 64), False, 64, float32, False, few_steps._by_backend),
        ((16, 16, 512), False, 512, float32, False, few_steps._at_once),
        ((16, 17, 512), False, 512, float32, False, few_steps._by_backend),
        ((16, 1, 1024), False, 1024, float32, False, few_steps._by_backend),
        ((16, 1, 1024), False, 1024, float16, False, few_steps._at_once),
        ((0, 8, 64), False, 64, float32, False, None),
        ((1, 0, 64), False, 64, float32, False, None),
        ((1, 64, 512), False, 512, float32, False, few_steps._by_warps),
        ((1, 64, 1150), False, 1150, float32, False, few_steps._by_tiles),
        ((1, 40_000, 4), False, 4, float32, False, few_steps._by_warps),
        ((1, 160_000, 4), False, 4, float32, False, few_steps._by_products),
        ((1, 256, 1150), False, 1150, float32, False, few_steps._by_tiles),
        ((1, 257, 1150), False, 1150, float32, False, few_steps._by_products),
        ((3, 96, 1150), False, 1150, float32, False, few_steps._by_products),
        ((4, 64, 1150), False, 1150, float32, False, few_steps._by_tiles),
        ((4, 72, 1150), False, 1150, float32, False, few_steps._by_backend),
        ((5, 48, 1150), False, 1150, float32, False, few_steps._by_backend),
        ((1, 8, 64), False, 64, float64, False, few_steps._by_operators),
        ((2, 8, 64), False, 64, float64, False, None),
        ((1, 8, 64), False, 64, float32, True, few_steps._by_operators),
        ((2, 8, 64), False, 64, float32, True, few_steps._by_backend),
        ((1, 8, 64), False, 64, float16, True, None),
        ((1, 8, 64), False, 64, torch.int64, False, None),
    ):
        assert way_for(cell, 1, shape, batch_first, size, dtype, True, norm) is wanted, (shape, size, dtype, norm)
    assert way_for(cell, 2, (16, 8, 64), False, 64, float32, True, False) is few_steps._at_once
    assert way_for(cell, 2, (16, 8, 64), False, 64, float32, True, True) is few_steps._by_backend
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
