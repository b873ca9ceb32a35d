"""A few steps without gradients, with little work for the host: short ones take more of its time than of the GPU's.

On GPUs a launch takes a whole step, products included (``few_steps.cu``): by warps, as long as this is not slower than
cuBLAS and one more kernel, and beyond by tiles of the tensor cores. Of more small steps one launch takes all. More go
straight to the backend that ``"auto"`` takes. On CPUs C takes all steps, beside one or two of PyTorch's products. All
other single steps go through PyTorch's operators.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.backends.batched import remembered
from fairseq_rkm.ops.backends.native import native_steps
from fairseq_rkm.ops.backends.stepwise.step_loop import FEW_STEPS
from fairseq_rkm.ops.cells import OUTPUT, Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights, memory_dtype

SOURCE = Path(__file__).with_suffix(".cu")
MOST_SHORT_STEPS = 16
"""The most steps of a stack or a CPU: of more, the host is not what takes time."""
MOST_STEPS_BY_WARPS, MOST_PRODUCTS_BY_WARPS = 8, 1 << 29
"""The most steps that are launched one by one, and the most multiplications of a layer in a call. On an H200 a call of
170 million multiplications takes 45 us, and of 270 million, in two steps, 82; other ways take 100 us and more."""
MOST_STEPS_AT_ONCE, MOST_READ_AT_ONCE, MOST_PRODUCTS_AT_ONCE = 16, 400_000_000, 1 << 27
"""The most steps of a launch for all by warps, of as many multiplications, and the most bytes of weights that it reads.
Of larger problems a backend keeps the weights on the chip. Steps that could be launched one by one go in one launch
with up to so many multiplications: on an H200 two take 46 us of the host in place of 51, and four 45 in place of 64."""
MOST_STEPS_BY_TILES, MOST_PRODUCTS_BY_TILES = 4, 3_000_000_000
"""As before. On an H200 a step of d = 1150 and B = 64 takes 45 us in TF32 and 26 in bf16, of B = 128 80 and 46; with
more products backends take less time, whatever the host's."""
MOST_TILED_BATCH, MOST_TILE_ROWS, MOST_TILE_WEIGHTS = 256, 64, 48
"""By tiles: the most rows of the batch, and of a block the most rows of the batch at a time and of weights. Their sums
are in registers."""
READ_AT_ONCE = 128
"""The numbers that a warp reads at once, of float32."""
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
BLOCK_THREADS, TILE_THREADS, WARP = 128, 256, 32
"""The threads of a block by warps, of a block by tiles, and of a warp."""
MOST_ROWS = 16
"""The most rows of a warp: more sums do not fit in its registers."""

Result = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Cell, Tensor, Sequence[Weights], Tensor | None, Tensor | None, bool], Result]


@functools.lru_cache(maxsize=1024)
def way_for(
    cell: Cell, layers: int, shape: tuple[int, ...], batch_first: bool, size: int, dtype: torch.dtype, cuda: bool,
    norm: bool,
) -> Way | None:  # fmt: skip
    """The function that takes these steps through a stack of layers; None where there is none.

    Args:
        cell: the cell, with a linear kernel.
        layers: L.
        shape: of the inputs, ``(T, B, m)``, or ``(B, T, m)`` with ``batch_first``.
        batch_first: the layout of inputs and outputs.
        size: d.
        dtype: of inputs and weights.
        cuda: whether they are on a GPU; else they are on a CPU.
        norm: whether the memory is normalised, in float32 or float64: of 16 bits none is taken.

    Returns:
        A function of the cell; the inputs; the layers' weights, of n = 1, with numbers for scales; the hidden states
        and the memories, ``(L, B, d)``, or None for zeros; and ``batch_first``. It gives the last layer's output, in
        the inputs' layout, the hidden states and the memories after the last step, in memory of their own. All tensors
        are plain, contiguous, on one device, and of ``dtype``; memories are of the memory's dtype.
    """
    batch, steps = shape[:2] if batch_first else (shape[1], shape[0])
    if not steps or not batch or dtype not in FLOATS or (norm and dtype.itemsize < torch.float32.itemsize):
        return None
    if cuda and dtype != torch.float64 and nvrtc.available() is None:
        suits = None if norm else _suited(cell, steps, batch, max(shape[2], size), size, dtype.itemsize)
        if suits is not None:
            return suits
        if steps > 1 or not norm:
            return _otherwise(steps, norm) if steps <= MOST_SHORT_STEPS or layers == 1 else None
        return _by_operators
    if not cuda and steps <= MOST_SHORT_STEPS and native_steps.takes(cell, dtype, steps, batch, size):
        return native_steps.run
    return _by_operators if steps == 1 else None


def _suited(cell: Cell, steps: int, batch: int, features: int, size: int, element: int) -> Way | None:
    """The launches that suit layers whose inputs have up to ``features`` numbers."""
    products = steps * batch * size * _products_of_a_unit(cell, features, size)
    if products <= MOST_PRODUCTS_BY_WARPS:
        read = steps * size * (len(cell.gates) * features + len(cell.recurrent_gates) * size) * element
        few = steps == 1 or (steps <= MOST_STEPS_BY_WARPS and products > MOST_PRODUCTS_AT_ONCE)
        if not few and steps <= MOST_STEPS_AT_ONCE and read <= MOST_READ_AT_ONCE:
            return _at_once
        if steps <= MOST_STEPS_BY_WARPS:
            return _by_warps
    tiled = steps <= MOST_STEPS_BY_TILES and batch <= MOST_TILED_BATCH and products <= MOST_PRODUCTS_BY_TILES
    return _by_tiles if tiled else None


def _products_of_a_unit(cell: Cell, features: int, size: int) -> int:
    """The multiplications that a warp has time for, a step, unit and row: of short rows some lanes read nothing."""
    read, fed = (-(-depth // READ_AT_ONCE) * READ_AT_ONCE for depth in (features, size))
    return len(cell.gates) * read + len(cell.recurrent_gates) * fed


def _otherwise(steps: int, norm: bool = False) -> Way:
    """The way of so many steps on a GPU that no launch takes whole."""
    return _by_products if steps <= FEW_STEPS and not norm else _by_backend


class Launch(NamedTuple):
    """A compiled kernel of ``few_steps.cu`` for whole steps, the blocks of a launch and the threads of a block."""

    kernel: nvrtc.Kernel
    blocks: int
    threads: int


Scale = Tensor | float
"""A number here: layers with learned scales go another way."""
Prepare = Callable[[Cell, torch.dtype, Scale, Scale, int, int, int, int], Launch | None]
"""The launch for a cell, a dtype, ``s_i``, ``s_f``, B, d, an alignment and a device; None if there is none.

The alignment is the largest power of two below 16 that divides all addresses and lengths of rows in bytes; 0 for 16."""


class Layer(NamedTuple):
    """The steps of a layer: addresses, 0 for none; numbers of elements between rows and between steps; sizes."""

    x: int
    hidden: int
    memory: int
    input: int
    recurrent: int
    bias: int
    output: int
    last_hidden: int
    last_memory: int
    x_row: int
    x_step: int
    output_row: int
    output_step: int
    features: int
    size: int
    batch: int
    steps: int
    element: int


def _by_warps(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: on a GPU, a launch a layer and step."""
    done = _launched(_warps, _step_by_step, cell, x, layers, hidden, memory, batch_first)
    if done is None:
        raise TypeError("warps take all problems")
    return done


def _at_once(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: as :func:`_by_warps`, a launch a layer."""
    done = _launched(_resident_warps, _all_steps, cell, x, layers, hidden, memory, batch_first)
    if done is None:
        raise TypeError("warps take all problems")
    return done


def _by_tiles(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: as :func:`_by_warps`, where the tensor cores may round and have room."""
    done = None
    if x.dtype is not torch.float32 or dispatch.tf32(x):
        done = _launched(_tiles, _step_by_step, cell, x, layers, hidden, memory, batch_first)
    way = _otherwise(x.size(1 if batch_first else 0))
    return way(cell, x, layers, hidden, memory, batch_first) if done is None else done


def _launched(
    prepare: Prepare, take: Callable[[Launch, Layer], None], cell: Cell, x: Tensor, layers: Sequence[Weights],
    hidden: Tensor | None, memory: Tensor | None, batch_first: bool,
) -> Result | None:  # fmt: skip
    """The steps of all layers, each by ``take``; None if a layer has no launch."""
    steps, batch = (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))
    features, size, element = x.size(2), layers[0].input.size(0) // len(cell.gates), x.element_size()
    states = len(layers), batch, size
    last_hidden = x.new_empty(states) if hidden is None else torch.empty_like(hidden)
    last_memory = x.new_empty(states, dtype=torch.float32) if memory is None else torch.empty_like(memory)
    # The rows from one of the batch to the next, and from step to step.
    beside, onward = (steps, 1) if batch_first else (1, batch)
    h, c, h_after, c_after = _address(hidden), _address(memory), last_hidden.data_ptr(), last_memory.data_ptr()
    output = x
    for weights in layers:
        inputs, output = output, x.new_empty((batch, steps, size) if batch_first else (steps, batch, size))
        read, matrix, recurrent = inputs.data_ptr(), weights.input.data_ptr(), _address(weights.recurrent)
        aligned = read | matrix | h | recurrent | features * element | (size * element if recurrent else 0)
        launch = prepare(
            cell, x.dtype, weights.sigma_i, weights.sigma_f, batch, size, aligned & -aligned & 15, x.get_device()
        )
        if launch is None:
            return None
        layer = Layer(
            read, h, c, matrix, recurrent, _address(weights.bias), output.data_ptr(), h_after, c_after,
            beside * features, onward * features, beside * size, onward * size, features, size, batch, steps, element,
        )  # fmt: skip
        take(launch, layer)
        features = size
        h, h_after = h and h + batch * size * element, h_after + batch * size * element
        c, c_after = c and c + batch * size * 4, c_after + batch * size * 4
    return output, last_hidden, last_memory


def _step_by_step(launch: Launch, layer: Layer) -> None:
    """A launch a step."""
    kernel, blocks, threads = launch
    (
        x, hidden, memory, matrix, recurrent, bias, output, last_hidden, last_memory, x_row, x_step, output_row,
        output_step, features, size, batch, steps, element,
    ) = layer  # fmt: skip
    hidden_row = size
    for step in range(steps):
        kernel.launch(
            blocks, threads, x, hidden, memory, matrix, recurrent, bias, output,
            last_hidden if step == steps - 1 else 0, last_memory, x_row, hidden_row, output_row, features, size, batch,
        )  # fmt: skip
        hidden, hidden_row, memory = output, output_row, last_memory
        x, output = x + x_step * element, output + output_step * element


def _all_steps(launch: Launch, layer: Layer) -> None:
    """A launch for all steps."""
    kernel, blocks, threads = launch
    counter = _counter(kernel.device) if layer.recurrent else None
    kernel.launch(blocks, threads, *layer[:9], counter, *layer[9:-1])


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def _counter(device: int) -> Tensor:
    """The counter at which blocks of a launch on the current stream meet: launches of a stream follow each other."""
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return _counter(device)
    if torch.cuda.is_current_stream_capturing():  # the graph may run beside this stream
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = device, torch._C._cuda_getCurrentRawStream(device)
    counter = _COUNTERS.get(key)
    if counter is None:
        counter = _COUNTERS[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=1024)
def _warps(
    cell: Cell, dtype: torch.dtype, sigma_i: Scale, sigma_f: Scale, batch: int, size: int, aligned: int, device: int
) -> Launch:
    """See :data:`Prepare`: a warp takes a unit of some rows."""
    rows = min(MOST_ROWS, 1 << (batch - 1).bit_length())
    more = ("ROWS", rows), ("WIDTH", (aligned or 16) // dtype.itemsize), ("THREADS", BLOCK_THREADS)
    kernel = _kernel("step_by_warps", cell, dtype, sigma_i, sigma_f, device, more)
    return Launch(kernel, -(-size // (BLOCK_THREADS // WARP)) * -(-batch // rows), BLOCK_THREADS)


@functools.lru_cache(maxsize=1024)
def _resident_warps(
    cell: Cell, dtype: torch.dtype, sigma_i: Scale, sigma_f: Scale, batch: int, size: int, aligned: int, device: int
) -> Launch:
    """See :data:`Prepare`: as :func:`_warps`, all at the same time; with more units and rows a warp takes several."""
    rows = min(MOST_ROWS, 1 << (batch - 1).bit_length())
    more = ("ROWS", rows), ("WIDTH", (aligned or 16) // dtype.itemsize), ("THREADS", BLOCK_THREADS)
    kernel = _kernel("steps_by_warps", cell, dtype, sigma_i, sigma_f, device, more, meets=cell.has_feedback)
    blocks = -(-size // (BLOCK_THREADS // WARP)) * -(-batch // rows)
    return Launch(
        kernel, min(blocks, kernel.most_blocks(BLOCK_THREADS)) if cell.has_feedback else blocks, BLOCK_THREADS
    )


@functools.lru_cache(maxsize=1024)
def _tiles(
    cell: Cell, dtype: torch.dtype, sigma_i: Scale, sigma_f: Scale, batch: int, size: int, aligned: int, device: int
) -> Launch | None:
    """See :data:`Prepare`: a multiprocessor takes some units. Rows are read 4 bytes at a time at least."""
    gpu = torch.cuda.get_device_properties(device)
    units, gates = -(-size // gpu.multi_processor_count), len(cell.gates)
    rows = min(MOST_TILE_ROWS, max(8, 1 << (batch - 1).bit_length()))
    shared = TILE_THREADS // WARP * rows * (-(-units * gates // 16) * 16 + 4) * 4
    room = units * gates <= MOST_TILE_WEIGHTS and shared <= gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if gpu.major < 8 or not room or 0 < aligned < 4:
        return None
    more = ("ROWS", rows), ("WORDS", (aligned or 16) // 4), ("UNITS", units), ("THREADS", TILE_THREADS)
    kernel = _kernel("step_by_tiles", cell, dtype, sigma_i, sigma_f, device, more, shared)
    return Launch(kernel, -(-size // units), TILE_THREADS)


def _by_backend(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: several steps on a GPU, by the backend that ``"auto"`` takes."""
    output = x.transpose(0, 1).contiguous() if batch_first else x
    after = []
    for number, weights in enumerate(layers):
        backend = dispatch.picked("auto", cell, output, weights)
        h, c = (None if state is None else state[number] for state in (hidden, memory))
        output, *states = backend.operator.passes.forward(cell, output, weights, h, c, None)[:3]
        after.append(states)
    return output.transpose(0, 1) if batch_first else output, *_stacked(after)


def _by_products(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: a step or a few on a GPU, by two products of cuBLAS and a kernel for each.

    ``stepwise`` does the same from a recording, of more steps than these.
    """
    time = 1 if batch_first else 0
    steps, found = x.split(1, time), []
    for step in steps:
        found.append(_layer_by_layer(_step_by_products, cell, step, layers, hidden, memory, batch_first))
        _, hidden, memory = found[-1]
    output, *states = found[-1]
    return (output if len(steps) == 1 else torch.cat([each[0] for each in found], time)), states[0], states[1]


def _by_operators(
    cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None, memory: Tensor | None, batch_first: bool
) -> Result:
    """See :func:`way_for`: one step by PyTorch's operators."""
    return _layer_by_layer(_step_by_operators, cell, x, layers, hidden, memory, batch_first)


def _layer_by_layer(
    step: Callable[..., Result], cell: Cell, x: Tensor, layers: Sequence[Weights], hidden: Tensor | None,
    memory: Tensor | None, batch_first: bool,
) -> Result:  # fmt: skip
    rows, size = x.numel() // x.size(2), layers[0].input.size(0) // len(cell.gates)
    output, after = x.view(rows, -1), []
    for number, weights in enumerate(layers):
        h, c = (None if state is None else state[number] for state in (hidden, memory))
        output, *states = step(cell, output, weights, size, h, c)
        after.append(states)
    return output.unsqueeze(1 if batch_first else 0), *_stacked(after)


def _stacked(states: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    """The layers' hidden states and memories."""
    if len(states) == 1:
        return states[0][0].unsqueeze(0), states[0][1].unsqueeze(0)
    hiddens, memories = zip(*states, strict=True)
    return torch.stack(hiddens), torch.stack(memories)


def _step_by_products(
    cell: Cell, x: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None
) -> Result:
    """The output, the hidden state and the memory after a step, ``(B, d)`` each; ``x``: ``(B, m)``."""
    # The kernel adds the bias: for a single row cuBLAS would need another launch.
    gates = _gates(cell, x, weights, None, size, hidden)
    output, after = (x.new_empty((x.size(0), size)) for _ in range(2))
    kept = x.new_empty((x.size(0), size), dtype=torch.float32)
    count = kept.numel()
    kernel = _kernel("pointwise_step", cell, x.dtype, weights.sigma_i, weights.sigma_f, x.get_device())
    given = gates, weights.bias, memory, output, after, kept
    kernel.launch(-(-count // BLOCK_THREADS), BLOCK_THREADS, *given, size, count)
    return output, after, kept


def _gates(cell: Cell, x: Tensor, weights: Weights, bias: Tensor | None, size: int, hidden: Tensor | None) -> Tensor:
    """The pre-activations, ``(B, G)``."""
    gates = F.linear(x, weights.input, bias)
    if weights.recurrent is not None and hidden is not None:
        whole = len(cell.recurrent_gates) == len(cell.gates)
        fed = gates if whole else gates[:, recurrent_slice(cell, size)]
        fed.addmm_(hidden, weights.recurrent.t())
    return gates


def _step_by_operators(
    cell: Cell, x: Tensor, weights: Weights, size: int, hidden: Tensor | None, memory: Tensor | None
) -> Result:
    """As :func:`_step_by_products`."""
    wide = memory_dtype(x.dtype)
    gates = _gates(cell, x, weights, weights.bias, size, hidden).to(wide)
    memory = gates.new_zeros((x.size(0), size)) if memory is None else memory
    if cell.squash_candidate:
        gates[:, :size].tanh_()
    if len(cell.gates) > 1:
        gates[:, size:].sigmoid_()
    after = torch.empty_like(memory)
    remembered(cell, weights, gates, memory, after)
    if cell.clip is not None:
        after.clamp_(-cell.clip, cell.clip)
    if weights.norm_weight is not None:
        after = F.layer_norm(after, (size,), weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS)
    output = after.tanh() if cell.squash_output else after
    if cell.output_is_gate:
        output = output * gates[..., gate_slices(cell, size)[OUTPUT]]
    output = output.to(x.dtype)
    return output, output.clone(), after


@functools.lru_cache(maxsize=1024)
def _kernel(
    name: str, cell: Cell, dtype: torch.dtype, sigma_i: Scale, sigma_f: Scale, device: int,
    more: tuple[tuple[str, int], ...] = (), shared: int = 0, meets: bool = False,
) -> nvrtc.Kernel:  # fmt: skip
    """A compiled kernel of ``few_steps.cu``; ``meets``: its blocks wait for each other."""
    macros = (
        *cell_macros(cell).items(),
        ("ELEMENT", dtype.itemsize),
        ("BF16", int(dtype == torch.bfloat16)),
        ("SCALE_I", f"{sigma_i!r}f"),
        ("SCALE_F", f"{sigma_f!r}f"),
        *more,
    )
    return nvrtc.compile_kernel(SOURCE, name, macros, shared, device, cooperative=meets)
