"""Launch Triton kernels with little work for the host.

Triton binds and looks through all arguments, constants and options of a call. This takes the host longer than the
launch. Here it does so once for each kind of arguments; later calls of the kind launch the compiled kernel.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

DIVISOR, LARGEST_INT32 = 16, (1 << 31) - 1
"""Triton compiles anew for addresses and numbers that are no multiple of this, for ones, and for larger numbers."""


class Launcher:
    """A Triton kernel with the values of its constants.

    Args:
        kernel: made by ``triton.jit``. Its parameters are pointers and whole numbers; then come the constants.
        constants: the values of its ``tl.constexpr`` parameters by name.
        options: the compiler's, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: Any) -> None:
        self._kernel, self._flags = kernel, {**constants, **options}
        names = kernel.arg_names
        self._constants = tuple(constants[name] for name in names[len(names) - len(constants) :])
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], device: torch.device, *arguments: Tensor | int) -> None:
        """Launch on a device's current stream.

        Args:
            grid: the numbers of programs.
            device: a GPU; with Triton's interpreter, the CPU.
            arguments: all of the kernel but the constants. Tensors lie on the device and live until this returns.
        """
        if device.type != "cuda":
            self._kernel[grid](*arguments, **self._flags)
            return
        index = device.index
        with nullcontext() if torch._C._cuda_getDevice() == index else torch.cuda.device(index):
            kind: list[Any] = [index]
            values: list[int] = []
            for argument in arguments:
                if isinstance(argument, int):
                    kind.append(1 if argument == 1 else (argument % DIVISOR == 0, argument > LARGEST_INT32))
                    values.append(argument)
                else:
                    address = argument.data_ptr()
                    kind.append((argument.dtype, address % DIVISOR == 0))
                    values.append(address)
            compiled = self._compiled.get(tuple(kind))
            if compiled is None:
                self._compile(tuple(kind), grid, arguments)
            else:
                stream = torch._C._cuda_getCurrentRawStream(index)
                compiled[grid](*values, *self._constants, stream=stream)

    def _compile(self, kind: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Tensor | int, ...]) -> None:
        """Launch by Triton's own way, which compiles, and keep the compiled kernel."""
        from triton.compiler import CompiledKernel

        compiled = self._kernel[grid](*arguments, **self._flags)
        if isinstance(compiled, CompiledKernel):
            self._compiled[kind] = compiled
