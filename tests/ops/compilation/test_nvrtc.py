"""Launches, as the driver sees them: no GPU needed."""

import contextlib
import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch

from fairseq_rkm.ops.compilation import nvrtc


class Driver:
    """Keeps what each launch was given, read at the launch as CUDA's driver does."""

    def __init__(self) -> None:
        self.launches, self.status = [], 0

    def cuFuncSetAttribute(self, *_):  # noqa: N802 - the driver's names
        return 0

    def cuGetErrorString(self, _status, text):  # noqa: N802
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"too many blocks"
        return 0

    def cuLaunchKernelEx(self, reference, function, pointers, _extra):  # noqa: N802
        configuration = reference._obj
        attributes = [configuration.attributes[i] for i in range(configuration.count)]
        self.launches.append(
            {
                "function": function.value,
                "grid": list(configuration.grid),
                "block": list(configuration.block),
                "shared": configuration.shared,
                "stream": configuration.stream,
                "attributes": [(a.kind, a.value[0]) for a in attributes],
                "arguments": [ctypes.c_uint64.from_address(p).value for p in pointers],
            }
        )
        return self.status


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 70 + device, raising=False)
    return driver


def test_a_launch_is_cooperative_and_gives_addresses_numbers_and_null(driver):
    kernel, tensor = nvrtc.Kernel(ctypes.c_void_p(5), 1000, 0, 1), torch.zeros(3)
    kernel.launch(132, 256, tensor, None, 7)
    kernel.launch(132, 256, None, tensor, 8)
    first, second = driver.launches
    assert first["arguments"] == [tensor.data_ptr(), 0, 7]
    assert second["arguments"] == [0, tensor.data_ptr(), 8]
    assert (first["function"], first["grid"], first["block"]) == (5, [132, 1, 1], [256, 1, 1])
    assert (first["shared"], first["stream"]) == (1000, 70)
    assert first["attributes"] == [(2, 1)]


def test_blocks_of_a_cluster_are_launched_side_by_side(driver):
    nvrtc.Kernel(ctypes.c_void_p(5), 0, 0, 4).launch(8, 32)
    assert driver.launches[0]["attributes"] == [(2, 1), (4, 4)]


def test_threads_do_not_share_what_a_launch_is_told(driver):
    kernel, calls = nvrtc.Kernel(ctypes.c_void_p(5), 0, 0, 1), []

    def look():
        calls.append(kernel._call(1, 32, 2))

    for thread in [threading.Thread(target=look) for _ in range(2)]:
        thread.start()
        thread.join()
    look()
    assert len({id(call) for call in calls}) == 3
    assert kernel._call(1, 32, 2) is calls[2]
    assert kernel._call(2, 32, 2) is not calls[2]


def test_what_the_driver_refuses_is_said(driver):
    driver.status = 720
    with pytest.raises(RuntimeError, match="CUDA error 720: too many blocks"):
        nvrtc.Kernel(ctypes.c_void_p(5), 0, 0, 1).launch(1000, 32)


def test_a_launch_need_not_be_cooperative(driver):
    nvrtc.Kernel(ctypes.c_void_p(5), 0, 0, 1, cooperative=False).launch(100_000, 32)
    assert driver.launches[0]["attributes"] == []


def test_the_blocks_that_a_gpu_holds_at_a_time(driver, monkeypatch):
    def ask(count, function, threads, shared):
        assert (function.value, threads, shared.value) == (5, 128, 1000)
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 3
        return 0

    monkeypatch.setattr(driver, "cuOccupancyMaxActiveBlocksPerMultiprocessor", ask, raising=False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    assert nvrtc.Kernel(ctypes.c_void_p(5), 1000, 0, 1).most_blocks(128) == 396
