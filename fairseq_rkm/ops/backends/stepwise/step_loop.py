"""The loop over the steps of one pass: a matrix product and a Triton kernel each.

Launched from Python, a step costs the host more time than the GPU. So stretches of 64, 16, 4 steps and of one are
recorded as CUDA graphs. A sequence of any length is a few of them, one after the other. The graphs work on buffers of
their own, and find the sequence's tensors through a table of addresses (``step_kernels.py``). Layers of one kind share
them, and batches of similar sizes (:func:`rows_for`).
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.batch_rounding import round_up
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gate_layout import gate_places
from fairseq_rkm.ops.kernel_functions import slopes_of
from fairseq_rkm.ops.triton_launches import Launcher
from fairseq_rkm.ops.weights import LAYER_NORM_EPS

STRETCHES = (64, 16, 4, 1)
"""The numbers of steps that are recorded as one graph, each when it is first needed."""
FEW_STEPS = 3
"""Up to so many steps are launched one by one: a graph would need a copy of the weights."""
MOST_LOOPS, MOST_BUFFERED = 64, 1 << 30
"""How many loops, and how many bytes of their buffers, are kept for each device."""
PITCH = 8
"""Rows of buffers are a multiple of so many elements long; other products take three times as long."""
WIDE_BLOCK, NARROW_BLOCK, MANY = 1024, 256, 1 << 18
"""The units of a program for more and for less than so many units in all rows together."""
MOST_SPLIT_ROWS = {"float16": 128, "bfloat16": 128, "float32": 8, "tf32": 0}
"""Up to so many rows, but for a single one, the backward product is one for each gate, in one launch, by precision.

cuBLAS cuts products of so few rows in pieces as well, and launches another kernel to add them up. On an H200 a step is
5 to 15% faster so in 16 bits (d = 512 to 3072), and 1.3 to 1.5 times with 8 rows of float32; with more of these, and in
TF32, it is up to 13% slower.
"""
LARGEST_CHUNK = 4096
"""The units of a row whose squared length a program sums at once."""


class Kind(NamedTuple):
    """All that the buffers and the graphs of a loop depend on.

    Attributes:
        cell: the cell.
        backward: the pass.
        rows: the rows of the batch, rounded up.
        size: d.
        dtype: of inputs, weights and outputs.
        norm: whether the memory is normalised.
        mask: whether there is padding.
        given: whether there is a bias, forward; whether all steps' outputs have gradients, backward.
        tf32: whether products of float32 matrices are TF32.
        totals: the sums over the steps that the backward pass of a candidate through a kernel takes: of ``"bias"``,
            ``"filters"``, ``"scale"``, ``"offset"``, ``"sigma_i"`` and ``"sigma_f"``.
        joined: whether the product and all else of a step are one kernel (``joined_loop.py``).
    """

    cell: Cell
    backward: bool
    rows: int
    size: int
    dtype: torch.dtype
    norm: bool
    mask: bool
    given: bool
    tf32: bool
    totals: tuple[str, ...] = ()
    joined: bool = False

    @property
    def block(self) -> int:
        """The units of a program; layer normalisation takes all of a row."""
        if self.norm:
            return _power(self.size)
        return min(_power(self.size), WIDE_BLOCK if self.rows * self.size >= MANY else NARROW_BLOCK)

    @property
    def parts(self) -> int:
        """The programs that share a row."""
        return -(-self.size // self.block)

    @property
    def recurrent(self) -> int:
        """The number of gates' units that see ``h_{t-1}``."""
        return len(self.cell.recurrent_gates) * self.size

    @property
    def precision(self) -> str:
        """``"tf32"``, or the dtype."""
        return precision_of(self.dtype, self.tf32)

    @property
    def pieces(self) -> int:
        """How many products are a step's: one, or backward one for each gate that sees ``h_{t-1}``, to be added up."""
        split = self.backward and 1 < self.rows <= MOST_SPLIT_ROWS[self.precision]
        # Else each piece of a product of 16 bits would be rounded to them.
        split = split and (self.dtype == torch.float32 or hasattr(torch.ops.aten.bmm, "dtype_out"))
        return len(self.cell.recurrent_gates) if split else 1


@dataclass
class Sequence:
    """The tensors of one pass over a sequence, as ``step_kernels.py`` names them; None for one that is not read.

    A candidate through a kernel has the last four:

    Attributes:
        filters: ``|w|^2``, s, b and the bias, ``(4, d)``.
        windows: ``|X_t|^2`` forward and ``|z_t|^2`` backward, ``(T, B)``, for kernels that read it; as the next.
        shares: the parts of the gradient of ``|z_t|^2`` from each of the programs that share a row, ``(T, B, parts)``.
        totals: the sums of :attr:`Kind.totals`, ``(len(totals), B, d)``.
    """

    gates: Tensor
    memories: Tensor
    hiddens: Tensor | None = None
    keep: Tensor | None = None
    bias: Tensor | None = None
    scale_i: Tensor | None = None
    scale_f: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    moments: Tensor | None = None
    grad_output: Tensor | None = None
    grad_gates: Tensor | None = None
    grad_gain: Tensor | None = None
    grad_shift: Tensor | None = None
    filters: Tensor | None = None
    windows: Tensor | None = None
    shares: Tensor | None = None
    totals: Tensor | None = None


def rows_for(batch: int, dtype: torch.dtype, joined: bool = False) -> int:
    """The rows of the buffers for a batch.

    A single row of float32 stays alone: cuBLAS multiplies a matrix by a vector faster than by eight. So does one of a
    kernel that joins a step.
    """
    return 1 if batch == 1 and (joined or dtype == torch.float32) else round_up(batch)


def _power(count: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (count - 1).bit_length()


def _padded(count: int) -> int:
    return -(-count // PITCH) * PITCH


class StepLoop:
    """Buffers of a kind of loop, its kernel launches, and their graphs.

    Attributes:
        weights: U, ``(R * d, d)``, each gate's rows and columns padded with zeros.
        fed: the product's operand: ``h_{t-1}`` forward, the recurrent gates' gradients backward; padding is zero.
        sums: the product: ``U h_{t-1}`` forward, the gradient of ``h_{t-1}`` backward, in pieces to be added up,
            ``(kind.pieces, rows, columns)``.
        carry: the gradient of ``c_t``, backward.
        held: the gradient of ``h_t`` that passes by padding, backward.
        lock: held by a thread from its first launch to its last.
    """

    def __init__(self, kind: Kind, device: torch.device, weights: Tensor | None = None) -> None:
        """``weights`` are taken as they are, if they need no padding."""
        self.kind, self.device, self.lock = kind, device, threading.Lock()
        self.table = torch.zeros(_kernels().ENTRIES, dtype=torch.int64, device=device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._make_buffers(weights)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _make_buffers(self, weights: Tensor | None) -> None:
        kind = self.kind
        self._pitch = size = _padded(kind.size)
        gates = len(kind.cell.recurrent_gates) * size
        aligned = weights is not None and weights.shape == (gates, size) and weights.is_contiguous()
        self.weights: Tensor = (
            weights if weights is not None and aligned else self._zeros(gates, size, dtype=kind.dtype)
        )
        read, made = (gates, size) if kind.backward else (size, gates)
        self.fed, self.sums = self._zeros(kind.rows, read, dtype=kind.dtype), self._zeros(kind.pieces, kind.rows, made)
        carried = (kind.rows, kind.size) if kind.backward else (0, 0)
        self.carry, self.held = self._zeros(*carried), self._zeros(*carried)
        self._launcher = _launcher(kind)

    @property
    def bytes(self) -> int:
        buffers = (self.weights, self.fed, self.sums, self.carry, self.held)
        return sum(buffer.nbytes for buffer in buffers)

    def take_weights(self, recurrent: Tensor) -> None:
        """Have the products take these weights, ``(R * d, d)``."""
        if self.weights is not recurrent:
            gates, size = len(self.kind.cell.recurrent_gates), self.kind.size
            self.weights.view(gates, self._pitch, -1)[:, :size, :size] = recurrent.reshape(gates, size, size)

    def begin_forward(self, hidden: Tensor) -> None:
        """Begin with the first h, ``(B, d)``."""
        self.fed[: hidden.size(0), : self.kind.size] = hidden

    def begin_backward(self, batch: int, to_hidden: Tensor | None, to_memory: Tensor | None) -> None:
        """Begin with the gradients of the last h and c, ``(B, d)``; None for zeros."""
        self.sums[1:].zero_()
        for buffer, last in ((self.sums[0, :batch, : self.kind.size], to_hidden), (self.carry[:batch], to_memory)):
            _ = buffer.zero_() if last is None else buffer.copy_(last)
        self.held.zero_()

    def first_hidden_gradient(self, batch: int, _steps: int) -> Tensor:
        """The gradient of the first h, ``(B, d)``, after the backward pass."""
        return self.sums[:, :batch, : self.kind.size].sum(0) + self.held[:batch]

    def begin(self, sequence: Sequence, steps: int, batch: int) -> None:
        """Have the kernels read and write this sequence's tensors: the last launch before the steps'."""
        tensors = [self.table if tensor is None else tensor for tensor in vars(sequence).values()]
        _plain_launcher("fill")((1, 1, 1), self.table.device, [self.table, *tensors], steps, batch)

    def step(self, ahead: int) -> None:
        """Launch the step after ``ahead`` further ones."""
        if self.kind.backward:
            self._point(ahead)
            self._multiply(self.weights)
        else:
            self._multiply(self.weights.t())
            self._point(ahead)

    def run(self, sequence: Sequence, steps: int, batch: int) -> None:
        """Launch all steps: as graphs, after :meth:`prepare`."""
        self.begin(sequence, steps, batch)
        if not self._graphs:
            for ahead in range(steps):
                self.step(ahead)
            return
        for stretch in STRETCHES:
            for _ in range(steps // stretch):
                self._graphs[stretch]()
            steps %= stretch

    def prepare(self, steps: int) -> None:
        """Record the graphs that so many steps need, before :meth:`begin`: recording empties the table."""
        for stretch in STRETCHES:
            if steps >= stretch and stretch not in self._graphs:
                self._graphs[stretch] = self._record(stretch)
            steps %= stretch

    def _record(self, stretch: int) -> Callable[[], None]:
        stream, graph = _recording_stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with _RECORDING, torch.cuda.stream(stream):
            self.table.zero_()  # a sequence of no rows: the launch that compiles and loads all writes nothing
            self._launch(1)
            # Other threads, such as those that prepare batches, may do as they like meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._launch(stretch)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def _launch(self, stretch: int) -> None:
        for ahead in range(stretch):
            self.step(ahead)
        _plain_launcher("advance")((1, 1, 1), self.table.device, [self.table], stretch)

    def _multiply(self, weights: Tensor) -> None:
        """Store ``fed`` times ``weights``, whole or in pieces."""
        pieces = self.kind.pieces
        if pieces == 1:
            multiply(self.fed, weights, self.sums[0], self.kind.tf32)
        else:
            fed = self.fed.view(self.fed.size(0), pieces, -1).transpose(0, 1)
            multiply(fed, weights.view(pieces, -1, weights.size(1)), self.sums, self.kind.tf32)

    def _point(self, ahead: int) -> None:
        kind, (piece, pitch, _) = self.kind, self.sums.stride()
        more, pieces = ((self.carry, self.held), (piece,)) if kind.backward else ((), ())
        self._launcher(
            (kind.rows, kind.parts, 1), self.table.device, (self.table, self.sums, self.fed, *more), ahead, kind.size,
            pitch, *pieces, self.fed.stride(0), self._pitch,
        )  # fmt: skip


def multiply(fed: Tensor, weights: Tensor, sums: Tensor, tf32: bool) -> None:
    """Store a matrix product, or one for each of several pairs of matrices, in float32."""
    product = torch.ops.aten.mm if fed.dim() == 2 else torch.ops.aten.bmm
    if fed.dtype == torch.float32:
        with products(tf32):
            product.out(fed, weights, out=sums)
    elif fed.is_cuda and hasattr(product, "dtype_out"):
        product.dtype_out(fed, weights, torch.float32, out=sums)
    else:
        sums.copy_(fed @ weights)


def precision_of(dtype: torch.dtype, tf32: bool) -> str:
    """The name of a precision: ``"tf32"``, or the dtype's."""
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def _kernels() -> Any:
    """The kernels; importing them takes Triton."""
    from fairseq_rkm.ops.backends.stepwise import step_kernels

    return step_kernels


def equation_options(kind: Kind) -> dict[str, Any]:
    """The compile-time arguments of all kernels of a kind: its equations."""
    import triton.language as tl

    cell = kind.cell
    narrow = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[kind.dtype]
    first = cell.gates.index(cell.recurrent_gates[0])
    return {
        "N_GATES": len(cell.gates), "FIRST_RECURRENT": first, "RECURRENT": len(cell.recurrent_gates),
        **gate_places(cell), "SQUASH_CANDIDATE": cell.squash_candidate, "SQUASH_OUTPUT": cell.squash_output,
        "CLIP": cell.clip, "MASK": kind.mask, "NARROW": narrow,
        "HAS_GRAD_OUTPUT" if kind.backward else "HAS_BIAS": kind.given,
    }  # fmt: skip


@functools.cache
def _plain_launcher(name: str) -> Launcher:
    """The launches of a kernel without constants."""
    return Launcher(getattr(_kernels(), name), {})


@functools.lru_cache(maxsize=4 * MOST_LOOPS)
def _launcher(kind: Kind) -> Launcher:
    """The launches of a kind's kernel beside a product."""
    kernel = _kernels().backward if kind.backward else _kernels().forward
    last = {"PIECES": kind.pieces} if kind.backward else {"EPSILON": LAYER_NORM_EPS}
    constants = {
        **equation_options(kind), "NORM": kind.norm, "BLOCK": kind.block, **last, **_kernel_options(kind)
    }  # fmt: skip
    return Launcher(kernel, constants, num_warps=min(16, max(1, kind.block // 256) * (1 if kind.norm else 2)))


_TOTALS = ("bias", "filters", "scale", "offset", "sigma_i", "sigma_f")


def _kernel_options(kind: Kind) -> dict[str, Any]:
    """The compile-time arguments that say how candidates go through their kernel; None is the linear one."""
    value, slopes, kernel = None, None, kind.cell.kernel
    if not kernel.is_linear:
        from fairseq_rkm.ops.triton_kernel_functions import written

        value, slopes = written(kernel)
    reads_windows = "windows" in slopes_of(kernel)
    if not kind.backward:
        return {"VALUE": value, "CHUNK": min(_power(kind.size), LARGEST_CHUNK) if reads_windows else 0}
    places = {f"TO_{name.upper()}": kind.totals.index(name) if name in kind.totals else -1 for name in _TOTALS}
    return {"VALUE": value, "SLOPES": slopes, "PARTS": _power(kind.parts) if reads_windows else 0, **places}


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Products of float32 matrices in TF32, as cuDNN's LSTM has them, or in float32, whatever PyTorch's are.

    PyTorch's setting is the whole process's: a thread waits for another's product.
    """
    flags = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32" if tf32 else "ieee") if hasattr(flags, "fp32_precision") else (
        "allow_tf32", tf32
    )  # fmt: skip
    with _PRECISION:
        before = getattr(flags, name)
        setattr(flags, name, value)
        try:
            yield
        finally:
            setattr(flags, name, before)


class _Loops:
    """The loops of a device and stream, the longest unused of them given up beyond the limits."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, StepLoop] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, kind: Kind, device: torch.device, make: Callable[[Kind, torch.device], StepLoop]) -> StepLoop:
        """The loop of a kind for the current stream, made if need be: work on one stream takes turns."""
        key = kind, device.index, torch._C._cuda_getCurrentRawStream(device.index)
        with self._lock:
            loop = self._kept.get(key)
            if loop is None:
                loop = self._kept[key] = make(kind, device)
                self._give_up(device)
            self._kept.move_to_end(key)
            return loop

    def clear(self) -> None:
        """Give up all loops that no thread uses."""
        for device in {key[1] for key in self._kept}:
            torch.cuda.synchronize(device)
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def _give_up(self, device: torch.device) -> None:
        mine = [key for key in self._kept if key[1] == device.index]
        bytes_ = sum(self._kept[key].bytes for key in mine)
        while len(mine) > 1 and (len(mine) > MOST_LOOPS or bytes_ > MOST_BUFFERED):
            torch.cuda.synchronize(device)  # a graph may still run
            bytes_ -= self._kept.pop(mine.pop(0)).bytes


LOOPS = _Loops()
_STREAMS: dict[tuple[int, int], Any] = {}
_RECORDING = threading.Lock()
"""Held while a graph is recorded: threads that work on one stream record on one stream, too."""
_PRECISION = threading.Lock()
"""Held while PyTorch's precision of products is changed."""


def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs for the current one are recorded.

    cuBLAS has a workspace for each stream, and graphs keep the one that they were recorded with.
    """
    key = device.index, torch._C._cuda_getCurrentRawStream(device.index)
    if key not in _STREAMS:
        _STREAMS[key] = torch.cuda.Stream(device)
    return _STREAMS[key]


def on_device(device: torch.device) -> Any:
    """Make a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
