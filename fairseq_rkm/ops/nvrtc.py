"""Compile CUDA C++ at run time with the compiler that PyTorch brings (NVRTC), and launch it.

Launches are cooperative: the driver either makes all blocks of a grid resident at once or refuses, so that blocks which
wait for each other cannot hang.
"""

import ctypes
import functools
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from fairseq_rkm.ops.build_cache import built

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, function: ctypes.c_void_p, shared_bytes: int, device: int) -> None:
        self.function, self.shared_bytes, self.device = function, shared_bytes, device
        _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes))

    def launch(self, blocks: int, threads: int, *arguments: Tensor | int | None) -> None:
        """Launch on the device's current stream; a tensor is passed as its address, None as the null pointer.

        Numbers must not be negative: each argument is laid out in 8 bytes, of which the kernel reads what it declares.

        Raises:
            RuntimeError: the driver refuses, for instance because the blocks cannot all be resident.
        """
        values = [a if isinstance(a, int) else 0 if a is None else a.data_ptr() for a in arguments]
        block = _arguments(len(values))
        block.values[:] = values  # type: ignore[assignment]
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        size = (blocks, 1, 1, threads, 1, 1, self.shared_bytes)
        with nullcontext() if torch.cuda.current_device() == self.device else torch.cuda.device(self.device):
            _check(_driver().cuLaunchCooperativeKernel(self.function, *size, stream, block.pointers))


class _Arguments:
    """Room for a kernel's arguments, and pointers to them, as the driver takes them (it copies them at the launch)."""

    def __init__(self, count: int) -> None:
        self.values = (ctypes.c_uint64 * count)()
        first = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))


_rooms = threading.local()


def _arguments(count: int) -> _Arguments:
    """This thread's room for ``count`` arguments."""
    rooms: dict = _rooms.__dict__
    if count not in rooms:
        rooms[count] = _Arguments(count)
    return rooms[count]


@functools.cache
def compile_kernel(
    source: Path, name: str, macros: tuple[tuple[str, int | str], ...], shared: int, device: int
) -> Kernel:
    """Compile one ``extern "C"`` kernel of a file for a device; compiled once in a process.

    Args:
        source: the file.
        name: the kernel's.
        macros: names and values to define.
        shared: bytes of dynamic shared memory that its launches take.
        device: index of the CUDA device.

    Raises:
        RuntimeError: the compiler's log, if it fails.
    """
    with torch.cuda.device(device):
        _make_current(device)
        image = compile_image(source, macros, torch.cuda.get_device_capability(device))
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), image))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        return Kernel(function, shared, device)


@functools.cache
def compile_image(source: Path, macros: tuple[tuple[str, int | str], ...], capability: tuple[int, int]) -> bytes:
    """Machine code of a file for a compute capability, from the user's cache or compiled now; needs no GPU.

    Raises:
        RuntimeError: the compiler's log, if it fails.
    """
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in macros]
    text, version = source.read_bytes(), (ctypes.c_int(), ctypes.c_int())
    _compiler().nvrtcVersion(*map(ctypes.byref, version))
    inputs = [text.decode(), *options, *(str(number.value) for number in version)]
    path = built(f"{source.stem}.cubin", inputs, lambda path: path.write_bytes(_compile(source.name, text, options)))
    return path.read_bytes()


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
    """Why kernels cannot be compiled here; None if they can."""
    try:
        _compiler()
        _driver()
    except OSError as error:
        return f"no NVRTC or no driver here ({error})"
    return None


def _make_current(device: int) -> None:
    """Let this thread (autograd has its own) work in the context that PyTorch uses on a device."""
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
        # PyTorch's wheels bring it in a folder beside PyTorch that the loader does not search.
        for path in sorted(Path(torch.__file__).parents[1].glob(f"nvidia/**/{name}")):
            return ctypes.CDLL(str(path))
        raise


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA error {status}: {(text.value or b'unknown').decode()}")
