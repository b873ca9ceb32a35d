"""Launch Triton kernels with little work for the host.

Triton binds and looks through all arguments, constants and options of a call. This takes the host longer than the
launch. Here it does so once for each kind of arguments; later calls of the kind launch the compiled kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.triton_presence import is_triton_before

DIVISOR, LARGEST_INT32 = 16, (1 << 31) - 1
"""Triton compiles anew for addresses and numbers that are no multiple of this, for ones, and for larger numbers."""


class Launcher:
    """A Triton kernel with the values of its constants.

    Args:
        kernel: made by ``triton.jit``. Its parameters are pointers, whole numbers, and then the constants.
        constants: the values of its ``tl.constexpr`` parameters by name.
        options: the compiler's, such as ``num_warps``.
    """

    def __init__(self, kernel: Any, constants: Mapping[str, Any], **options: Any) -> None:
        self._kernel, self._flags = kernel, {**constants, **options}
        names = kernel.arg_names
        self._constants = tuple(constants[name] for name in names[len(names) - len(constants) :])
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, int, int], device: torch.device, tensors: Sequence[Tensor], *numbers: int
    ) -> None:
        """Launch on a device's current stream.

        Args:
            grid: the numbers of programs.
            device: a GPU; with Triton's interpreter, the CPU.
            tensors: where the kernel's pointers point to. They lie on the device and live until this returns.
            numbers: the kernel's other arguments but the constants.
        """
        index = device.index
        if device.type != "cuda":
            self._kernel[grid](*tensors, *numbers, **self._flags)
        elif torch._C._cuda_getDevice() == index:
            self._launch(grid, index, tensors, numbers)
        else:
            with torch.cuda.device(index):
                self._launch(grid, index, tensors, numbers)

    def _launch(
        self, grid: tuple[int, int, int], index: int, tensors: Sequence[Tensor], numbers: tuple[int, ...]
    ) -> None:
        addresses, bits = [tensor.data_ptr() for tensor in tensors], 0
        for address in addresses:
            bits |= address
        kind = (
            index,
            *[tensor.dtype for tensor in tensors],
            *[1 if number == 1 else (number % DIVISOR == 0, number > LARGEST_INT32) for number in numbers],
            *([address % DIVISOR == 0 for address in addresses] if bits % DIVISOR else ()),
        )
        compiled = self._compiled.get(kind)
        if compiled is None:
            self._compile(kind, grid, (*tensors, *numbers))
        else:
            compiled[grid](*addresses, *numbers, *self._constants, stream=torch._C._cuda_getCurrentRawStream(index))

    def _compile(self, kind: tuple[Any, ...], grid: tuple[int, int, int], arguments: tuple[Tensor | int, ...]) -> None:
        """Launch by Triton's own way: it compiles. Keep the compiled kernel."""
        from triton.compiler import CompiledKernel

        compiled = self._kernel[grid](*arguments, **self._flags)
        # Before Triton 3.3 a compiled kernel takes other arguments.
        if isinstance(compiled, CompiledKernel) and not is_triton_before(3, 3):
            self._compiled[kind] = compiled
