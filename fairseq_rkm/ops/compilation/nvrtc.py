"""Compile CUDA C++ at run time with PyTorch's own compiler (NVRTC), and launch it.

Launches are cooperative unless asked otherwise: the driver makes all blocks of a grid resident at once, or refuses.
Blocks that wait for each other therefore cannot hang.
"""

import ctypes
import functools
import threading
from pathlib import Path

import torch
from torch import Tensor

from fairseq_rkm.ops.compilation.build_cache import built

HEADER = Path(__file__).with_name("numbers.cuh")
INCLUDE = b'#include "numbers.cuh"\n'
"""The one header, and how files ask for it."""
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_COOPERATIVE, _CLUSTER = 2, 4  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (("kind", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Configuration(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Kernel:
    """A compiled kernel on one device."""

    def __init__(
        self, function: ctypes.c_void_p, shared_bytes: int, device: int, cluster: int, cooperative: bool = True
    ) -> None:
        self.function, self.shared_bytes, self.device, self.cluster = function, shared_bytes, device, cluster
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes))
        one, size = (ctypes.c_uint * 16)(1), (ctypes.c_uint * 16)(cluster, 1, 1)
        self._attributes = (_Attribute * 2)(_Attribute(_COOPERATIVE, 0, one), _Attribute(_CLUSTER, 0, size))
        self._count = 2 if cluster > 1 else int(cooperative)
        self._calls = threading.local()

    def _configuration(self, blocks: int, threads: int) -> _Configuration:
        grid, block = (ctypes.c_uint * 3)(blocks, 1, 1), (ctypes.c_uint * 3)(threads, 1, 1)
        return _Configuration(grid, block, self.shared_bytes, 0, self._attributes, self._count)

    def most_clusters(self, threads: int) -> int:
        """The number of the kernel's clusters, of blocks of ``threads`` threads, that the device holds at a time."""
        count, configuration = ctypes.c_int(), self._configuration(self.cluster, threads)
        _check(_driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), self.function, ctypes.byref(configuration)))
        return count.value

    def most_blocks(self, threads: int) -> int:
        """The number of the kernel's blocks, of ``threads`` threads, that the device holds at a time."""
        count, shared = ctypes.c_int(), ctypes.c_size_t(self.shared_bytes)
        with torch.cuda.device(self.device):
            ask = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
            _check(ask(ctypes.byref(count), self.function, threads, shared))
            return count.value * torch.cuda.get_device_properties(self.device).multi_processor_count

    def launch(self, blocks: int, threads: int, *arguments: Tensor | int | None) -> None:
        """Launch on the device's current stream.

        A tensor is passed as its address, None as the null pointer. Numbers must not be negative: each argument takes 8
        bytes, and the kernel reads as many as it declares.

        Raises:
            RuntimeError: the driver refuses, for instance because the blocks cannot all be resident.
        """
        call = self._call(blocks, threads, len(arguments))
        call.values[:] = [a if type(a) is int else 0 if a is None else a.data_ptr() for a in arguments]  # type: ignore[union-attr]
        # Triton asks so too; torch.cuda.current_stream would make an object at each call.
        call.configuration.stream = torch._C._cuda_getCurrentRawStream(self.device)
        if torch._C._cuda_getDevice() == self.device:
            status = _driver().cuLaunchKernelEx(call.reference, self.function, call.pointers, None)
        else:
            with torch.cuda.device(self.device):
                status = _driver().cuLaunchKernelEx(call.reference, self.function, call.pointers, None)
        if status:
            _check(status)

    def _call(self, blocks: int, threads: int, arguments: int) -> "_Call":
        """This thread's buffers for a launch of this size."""
        calls: dict = self._calls.__dict__
        key = blocks, threads, arguments
        call: _Call | None = calls.get(key)
        if call is None:
            call = calls[key] = _Call(self._configuration(blocks, threads), arguments)
        return call


def addresses(stack: Tensor) -> list[int]:
    """Where each part along the first dimension of a contiguous tensor lies, for a kernel that takes them apart."""
    first, count = stack.data_ptr(), stack.size(0)
    step = stack.nbytes // count
    return [first + i * step for i in range(count)]


class _Call:
    """A launch's configuration, its arguments, and pointers to both; the driver copies them."""

    def __init__(self, configuration: _Configuration, arguments: int) -> None:
        self.configuration, self.reference = configuration, ctypes.byref(configuration)
        self.values = (ctypes.c_uint64 * arguments)()
        first = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * arguments)(*range(first, first + 8 * arguments, 8))


@functools.cache
def compile_kernel(
    source: Path, name: str, macros: tuple[tuple[str, int | str], ...], shared: int, device: int, cluster: int = 1,
    cooperative: bool = True,
) -> Kernel:  # fmt: skip
    """Compile one ``extern "C"`` kernel of a file for a device, once in a process.

    Args:
        source: the CUDA file.
        name: the kernel's name.
        macros: names and values to define.
        shared: bytes of dynamic shared memory of a launch.
        device: index of the CUDA device.
        cluster: blocks that run side by side and reach each other's shared memory; they are resident at once.
        cooperative: whether all blocks of a launch must be resident at once.

    Raises:
        RuntimeError: the compiler's log, if it fails.
    """
    with torch.cuda.device(device):
        _make_current(device)
        image = compile_image(source, macros, torch.cuda.get_device_capability(device))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), image))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        return Kernel(function, shared, device, cluster, cooperative)


@functools.cache
def compile_image(source: Path, macros: tuple[tuple[str, int | str], ...], capability: tuple[int, int]) -> bytes:
    """Machine code of a file for a compute capability, from the user's cache or compiled now; needs no GPU.

    Raises:
        RuntimeError: the compiler's log, if it fails.
    """
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in macros]
    # Expanded here: the text is also the key to what was compiled before.
    text, version = source.read_bytes().replace(INCLUDE, HEADER.read_bytes()), (ctypes.c_int(), ctypes.c_int())
    _compiler().nvrtcVersion(*map(ctypes.byref, version))
    inputs = [text.decode(), *options, *(str(number.value) for number in version)]
    try:
        return built(
            f"{source.stem}.cubin", inputs, lambda path: path.write_bytes(_compile(source.name, text, options))
        ).content
    except OSError:  # no place to keep it
        return _compile(source.name, text, options)


def _compile(name: str, text: bytes, options: list[str]) -> bytes:
    compiler, program = _compiler(), ctypes.c_void_p()
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    compiler.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    failed = compiler.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    if failed:
        compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile with {options}:\n{log.value.decode()}")
    compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    compiler.nvrtcGetCUBIN(program, image)
    compiler.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


@functools.cache
def available() -> str | None:
    """The reason why kernels cannot be compiled here; None if they can."""
    try:
        _compiler()
        _driver()
    except OSError as error:
        return f"no NVRTC or no driver here ({error})"
    return None


def _make_current(device: int) -> None:
    """Give this thread PyTorch's context on a device; autograd runs backward passes in threads of its own."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device))
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    _check(_driver().cuCtxSetCurrent(context))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        # PyTorch's wheels put it in a folder beside PyTorch; the loader does not search there.
        for path in sorted(Path(torch.__file__).parents[1].glob(f"nvidia/**/{name}")):
            return ctypes.CDLL(str(path))
        raise


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")
