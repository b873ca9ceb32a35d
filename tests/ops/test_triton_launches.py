"""Launches of Triton kernels: calls that go through Triton's own way, and the arguments of all others."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fairseq_rkm.ops import triton_launches
from fairseq_rkm.ops.triton_launches import Launcher
from ops.backends.triton_interpreter import ONLY_COMPILES

compiler = pytest.importorskip("triton.compiler")
GPU = torch.device("cuda", 0)


class Compiled(compiler.CompiledKernel):
    """A compiled kernel that writes down its launches."""

    module = None

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.launches.append((grid, arguments, stream))


class Kernel:
    """A kernel as ``triton.jit`` makes it; it compiles one at each call."""

    arg_names = ("x", "y", "count", "SECOND", "FIRST")

    def __init__(self, compile_one=Compiled):
        self.calls, self.made, self._compile = [], [], compile_one

    def __getitem__(self, grid):
        def run(*arguments, **flags):
            self.calls.append((grid, arguments, flags))
            self.made.append(self._compile())
            return self.made[-1]

        return run


@pytest.fixture
def devices(monkeypatch):
    """The devices that became the current one; at first it is 0."""
    entered = []

    def enter(device):
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    monkeypatch.setattr(torch.cuda, "device", enter)
    return entered


def aligned(count, dtype=torch.float32, offset=0):
    """A tensor at a multiple of 16 bytes, and ``offset`` elements on."""
    whole = torch.zeros(count + 32, dtype=dtype)
    start = -whole.data_ptr() % 16 // whole.element_size() + offset
    return whole[start : start + count]


def test_calls_of_a_kind_launch_what_the_first_compiled(devices):
    kernel = Kernel()
    launch = Launcher(kernel, {"FIRST": 1, "SECOND": None}, num_warps=2)
    for count in (32, 48):
        x, y = aligned(5), aligned(3)
        launch((4, 2, 1), GPU, (x, y), count)
    assert [call[::2] for call in kernel.calls] == [((4, 2, 1), {"FIRST": 1, "SECOND": None, "num_warps": 2})]
    assert kernel.made[0].launches == [((4, 2, 1), (x.data_ptr(), y.data_ptr(), 48, None, 1), 70)]
    launch((4, 2, 1), torch.device("cuda", 1), (x, y), 48)  # another device has kernels of its own
    launch((4, 2, 1), torch.device("cuda", 1), (x, y), 48)
    assert len(kernel.calls) == 2
    assert kernel.made[1].launches[0][2] == 71
    assert devices == [1, 1]


@pytest.mark.usefixtures("devices")
def test_a_kind_is_all_that_triton_compiles_for():
    kernel = Kernel()
    launch = Launcher(kernel, {"FIRST": 1, "SECOND": 2})
    kinds = [
        (aligned(4), aligned(4), 16), (aligned(4, offset=1), aligned(4), 16), (aligned(4), aligned(4, offset=1), 16),
        (aligned(4, torch.bfloat16), aligned(4), 16), (aligned(4, torch.float16), aligned(4), 16),
        (aligned(4), aligned(4), 1), (aligned(4), aligned(4), 17), (aligned(4), aligned(4), 1 << 31),
        (aligned(4), aligned(4), (1 << 31) + 1), (aligned(4, offset=1), aligned(4, offset=1), 16),
    ]  # fmt: skip
    for _ in range(2):
        for kind in kinds:
            launch((1, 1, 1), GPU, kind[:2], *kind[2:])
    assert len(kernel.calls) == len(kinds)
    assert [len(made.launches) for made in kernel.made] == [1] * len(kinds)


@pytest.mark.usefixtures("devices")
def test_what_is_no_compiled_kernel_is_not_kept():
    kernel = Kernel(compile_one=object)
    launch = Launcher(kernel, {"FIRST": 1, "SECOND": 2})
    for _ in range(2):
        launch((1, 1, 1), GPU, (aligned(4), aligned(4)), 16)
    assert len(kernel.calls) == 2


@pytest.mark.usefixtures("devices")
def test_an_older_triton_launches_by_its_own_way(monkeypatch):
    monkeypatch.setattr(triton_launches, "is_triton_before", lambda *version: version == (3, 3))
    kernel = Kernel()
    launch = Launcher(kernel, {"FIRST": 1, "SECOND": 2})
    for _ in range(2):
        launch((1, 1, 1), GPU, (aligned(4), aligned(4)), 16)
    assert len(kernel.calls) == 2
    assert not any(made.launches for made in kernel.made)


def test_an_interpreter_gets_tensors():
    kernel, x = Kernel(), aligned(4)
    for _ in range(2):
        Launcher(kernel, {"FIRST": 1, "SECOND": 2}, num_warps=1)((1, 1, 1), torch.device("cpu"), (x, x), 16)
    assert [call[1][0] is x for call in kernel.calls] == [True, True]


class Driver:
    """A GPU as Triton's host side sees one: it compiles for it, and launches nothing."""

    def __init__(self):
        self.launched = []
        properties = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024), get_device_properties=lambda _: properties,
            unload_module=lambda _: None,
        )  # fmt: skip
        self.launcher_cls = lambda *_: lambda *launch: self.launched.append(launch)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 70


@pytest.mark.skipif(not ONLY_COMPILES, reason="Triton compiles nothing, or launches it")
@pytest.mark.usefixtures("devices")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_triton_s_own_kernels_are_launched_the_same_way(monkeypatch):
    from triton.runtime import driver

    from fairseq_rkm.ops.backends.stepwise import step_kernels

    monkeypatch.setattr(driver, "_active", Driver())
    launch, table = Launcher(step_kernels.advance, {}), aligned(20, torch.int64)
    for _ in range(2):
        launch((1, 1, 1), GPU, (table,), 17)
    first, second = driver.active.launched
    # The grid, the stream and the function; the tables differ, as Triton passes tensors.
    assert first[:5] == second[:5] == (1, 1, 1, 70, 2)
    assert first[-1] == second[-1] == 17
    assert (first[-2].data_ptr(), len(first)) == (second[-2], len(second))
