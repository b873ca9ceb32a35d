"""On GPUs, with feedback, for layers of up to 128 units: a block of threads holds the layer (``blockwise.cu``).

A block has all recurrent weights and takes some rows of the batch through the whole sequence. It waits for no other:
where ``persistent`` exchanges values through the GPU's memory at each step, this takes a barrier. Products are sums of
float32, whatever the type of the weights and whether TF32 is allowed. Both directions of a layer are one launch
(``blockwise_directions.py``).
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fairseq_rkm.ops.batch_rounding import likely
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.compilation.cell_macros import cell_macros
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.ngram import is_empty, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.weights import Weights

SOURCE = Path(__file__).with_suffix(".cu")
MOST_UNITS = 128
"""The most units: more weights do not fit into registers and shared memory of a multiprocessor."""
ROWS = (1, 2, 4, 8)
"""The rows of the batch that a block may take."""
FEW_THREADS = 256
"""With more threads in a block, one has half as many registers."""
HELD = {1: 16, 2: 12, 4: 10}
"""Four columns of weights make a chunk. Of many threads each holds so many in registers, by rows; of few, 16."""
DEPTHS = {False: {1: 6, 2: 4, 4: 3, 8: 2}, True: {1: 4, 2: 2, 4: 1}}
"""How many steps ahead values are fetched, by many threads or few, and rows: as far as registers reach."""
CLOCKS_PER_STEP, CLOCKS_PER_CHUNK, CLOCKS_PER_REST, GIGAHERTZ = 850, 3.5, 6.0, 1.7
"""A step without products; a warp's product of a chunk and a row; its fetch of a chunk of the rest; the clock."""
NARROW_ROW = 0.4
"""Microseconds for a row of a block in 16 bits. On an H200 64 units and 512 rows take 0.40 ms in bfloat16 and float16,
twice measured, and 0.34 in TF32, of 64 steps; ``persistent`` takes 0.31 in bfloat16."""


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """The reason why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda":
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is None:
        return "without feedback there is nothing to hold"
    if weights.recurrent.size(1) > MOST_UNITS:
        return f"it holds layers of up to {MOST_UNITS} units"
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, float16 and bfloat16, not in {inputs.dtype}"
    if weights.norm_weight is not None:
        return "it does not normalise"
    if is_empty(inputs, weights.input):
        return "it needs at least one step and one sequence"
    if not torch.cuda.is_available():
        return "there is no GPU here, and the inputs only stand for some on one"
    if not _room(cell, weights.recurrent.size(1), inputs.device.index):
        return f"the weights of {weights.recurrent.size(1)} units do not fit into this GPU's shared memory"
    return nvrtc.available()


def step_time(cell: Cell, inputs: Tensor, weights: Weights) -> float:
    """The estimated microseconds of a step, forward and backward."""
    size, device = weights.input.size(0) // len(cell.gates), inputs.device.index
    batch = likely(inputs.size(1))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    rows = _rows_for(cell, size, batch, device)
    waves = -(-batch // (rows * processors))
    narrow = NARROW_ROW if inputs.dtype.itemsize < torch.float32.itemsize else 0.0
    return waves * (block_time(cell, size, rows) + rows * narrow)


def block_time(cell: Cell, size: int, rows: int) -> float:
    """The estimated microseconds of a step of a block with so many rows, forward and backward."""
    warps, chunks = max(4, _threads(cell, size) // 32), -(-size // 4)
    rest = chunks - _held(cell, size, rows)
    work = warps * (chunks * rows * CLOCKS_PER_CHUNK + rest * CLOCKS_PER_REST)
    return 2 * (CLOCKS_PER_STEP + work) / (GIGAHERTZ * 1e3)


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    gates = project(inputs, weights.input, None)
    steps, batch, width = gates.shape
    size = width // len(cell.gates)
    hiddens = gates.new_empty((steps + 1, batch, size))
    memories = gates.new_empty((steps + 1, batch, size), dtype=torch.float32)
    last_hidden, last_memory = gates.new_empty((batch, size)), memories.new_empty((batch, size))
    launch_forward(cell, (weights,), keep, gates, (hidden, memory), (last_hidden, last_memory), hiddens, memories)
    output = hiddens[1:] if keep is None else hiddens[1:].masked_fill(~keep.unsqueeze(-1), 0)
    return Results(output, last_hidden, last_memory, (gates, hiddens, memories))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, weights, (gates, hiddens, memories) = saved.cell, saved.weights, saved.own
    grad_output, grad_hidden, grad_memory = grads
    grad_output = None if grad_output is None else grad_output.contiguous()
    last = [None if g is None else g.float().contiguous() for g in (grad_hidden, grad_memory)]
    _, batch, size = memories.shape
    first = memories.new_empty((2, batch, size))
    grad_gates = torch.empty_like(gates)
    launch_backward(
        cell, (weights,), saved.keep, gates, memories, grad_output, last, nvrtc.addresses(first), grad_gates
    )
    need_inputs, need_hidden, need_memory, *need_weights = needs
    grad_inputs, *rest = parameter_gradients(
        cell, weights, saved.inputs, hiddens, memories, gates, grad_gates, {}, (need_inputs, *need_weights)
    )
    initial = first[0].to(hiddens.dtype) if need_hidden else None, first[1] if need_memory else None
    return grad_inputs, *initial, *rest


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The gates, all h and all c."""
    steps, batch, size, gates, narrow, wide, _ = extent
    return ((steps, batch, gates), narrow), ((steps + 1, batch, size), narrow), ((steps + 1, batch, size), wide)


PASSES = Passes(forward, backward, own)


@functools.cache
def _room(cell: Cell, size: int, device: int) -> tuple[int, ...]:
    """The rows of a block for which a GPU has room."""
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    choices = ROWS if _threads(cell, size) <= FEW_THREADS else tuple(HELD)
    return tuple(rows for rows in choices if shared_bytes("backward", cell, size, rows) <= shared)


@functools.cache
def _rows_for(cell: Cell, size: int, batch: int, device: int, directions: int = 1) -> int:
    """The fewest rows with which all blocks run at a time, or the most."""
    processors, room = torch.cuda.get_device_properties(device).multi_processor_count, _room(cell, size, device)
    return next((rows for rows in room if directions * -(-batch // rows) <= processors), room[-1])


def _threads(cell: Cell, size: int) -> int:
    """The threads of a block: whole warps, and 1, 2 or 4 threads for each unit."""
    lanes = 1 << (len(cell.gates) - 1).bit_length()
    return -(-size * lanes // 32) * 32


def _held(cell: Cell, size: int, rows: int) -> int:
    """The chunks of weights in a thread's registers."""
    return min(-(-size // 4), HELD[rows] if _threads(cell, size) > FEW_THREADS else HELD[1])


Given = Tensor | int | None
"""A kernel's argument; an int is an address."""


def launch_forward(
    cell: Cell, directions: Sequence[Weights], keep: Tensor | None, gates: Tensor, first: Sequence[Given],
    last: Sequence[Given], hiddens: Given, memories: Given, output: Tensor | None = None, rows: int | None = None,
) -> None:  # fmt: skip
    """Launch the forward kernel; the layouts are those of ``Course`` in ``blockwise.cu``.

    Args:
        cell: the cell.
        directions: the weights of one direction, or of both.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        gates: the inputs' products, without the bias; they become the activated gates.
        first: the initial hidden state and memory; None is zeros.
        last: where the final ones go.
        hiddens: where all h go.
        memories: where all c go.
        output: where the outputs of both directions go, zero at padding; None for no need of them.
        rows: the rows of a block; None lets all blocks run at a time, if they can.
    """
    given = gates, directions[0].bias, directions[0].recurrent, *first, *last, hiddens, memories, output
    back = (directions[1].bias, directions[1].recurrent) if len(directions) > 1 else (None, None)
    _launch("forward", cell, directions, keep, gates, given, back, rows)


def launch_backward(
    cell: Cell, directions: Sequence[Weights], keep: Tensor | None, gates: Tensor, memories: Given,
    grad_output: Tensor | None, last: Sequence[Given], first: Sequence[Given], grad_gates: Tensor,
    rows: int | None = None,
) -> None:  # fmt: skip
    """Launch the backward kernel; the layouts are those of ``Course`` in ``blockwise.cu``.

    Args:
        cell: the cell.
        directions: the weights of one direction, or of both.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        gates: the activated gates.
        memories: all c.
        grad_output: the gradients of the outputs; None is zeros.
        last: those of the final hidden state and memory, float32; None is zeros.
        first: where those of the initial ones go, float32.
        grad_gates: where those of the pre-activations go.
        rows: the rows of a block; None lets all blocks run at a time, if they can.
    """
    given = gates, directions[0].recurrent, memories, grad_output, *last, *first, grad_gates
    back = (directions[1].recurrent if len(directions) > 1 else None,)
    _launch("backward", cell, directions, keep, gates, given, back, rows)


def _launch(
    direction: str, cell: Cell, directions: Sequence[Weights], keep: Tensor | None, gates: Tensor,
    given: tuple[Given, ...], back: tuple[Given, ...], rows: int | None,
) -> None:  # fmt: skip
    """Launch a kernel over the rows of the batch; ``back``: the matrices of the direction against time."""
    (steps, batch, width), count = gates.shape, len(directions)
    size = width // (count * len(cell.gates))
    scales = [_scales(cell, weights, gates, size) for weights in directions]
    # Read by address: they must live until the launch.
    real = None if keep is None else keep.contiguous().view(torch.uint8)
    kernel, blocks, threads = _prepare(
        direction, cell, size, batch, gates.dtype, keep is not None, gates.get_device(), count, rows
    )
    back_scales = scales[1] if count > 1 else (None, None)
    kernel.launch(blocks, threads, *given, real, *scales[0], *back, *back_scales, steps, batch)


def _scales(cell: Cell, weights: Weights, like: Tensor, size: int) -> tuple[Tensor | None, Tensor | None]:
    """``s_f``, ``(d,)``, and ``s_i``, ``(1,)``, float32; None where the cell has gates in their place."""
    if cell.forget_is_gate:
        return None, None
    return (
        _scale(weights.sigma_f, like, size) if cell.forget_is_constant else None,
        _scale(weights.sigma_i, like, 1) if cell.input_is_constant else None,
    )


def _scale(value: Tensor | float, like: Tensor, count: int) -> Tensor:
    if isinstance(value, Tensor):
        return value.float().expand(count).contiguous()
    return like.new_full((count,), value, dtype=torch.float32)


@functools.cache
def _prepare(
    direction: str, cell: Cell, size: int, batch: int, dtype: torch.dtype, mask: bool, device: int, directions: int,
    rows: int | None,
) -> tuple[nvrtc.Kernel, int, int]:  # fmt: skip
    """A compiled kernel, the blocks of its launch and the threads of a block."""
    rows = _rows_for(cell, size, batch, device, directions) if rows is None else rows
    kernel = _kernel(direction, cell, size, dtype, rows, mask, device, directions)
    return kernel, directions * -(-batch // rows), _threads(cell, size)


@functools.cache
def _kernel(
    direction: str, cell: Cell, size: int, dtype: torch.dtype, rows: int, mask: bool, device: int, directions: int
) -> nvrtc.Kernel:
    """A compiled kernel of ``blockwise.cu``."""
    options = macros(direction, cell, size, dtype, rows, mask, directions)
    shared = shared_bytes(direction, cell, size, rows)
    kernel = nvrtc.compile_kernel(SOURCE, f"blockwise_{direction}", options, shared, device, cooperative=False)
    LOADED.add((direction, cell, size, dtype, rows, mask, device, directions))
    return kernel


LOADED: set[tuple] = set()
"""The arguments of :func:`_kernel` so far."""


def macros(
    direction: str, cell: Cell, size: int, dtype: torch.dtype, rows: int, mask: bool, directions: int = 1
) -> tuple[tuple[str, int | str], ...]:
    """The cell, the dtype and the sizes as macros of ``blockwise.cu``."""
    return (
        *cell_macros(cell).items(),
        ("MASK", int(mask)),
        ("DIRECTIONS", directions),
        ("ELEMENT", dtype.itemsize),
        ("BF16", int(dtype == torch.bfloat16)),
        ("SIZE", size),
        ("ROWS", rows),
        ("DEPTH", DEPTHS[_threads(cell, size) > FEW_THREADS][rows]),
        ("HELD", _held(cell, size, rows)),
        ("BACKWARD", int(direction == "backward")),
    )


def shared_bytes(direction: str, cell: Cell, size: int, rows: int) -> int:
    """The shared memory of a block: the weights that registers do not hold, and two buffers of values."""
    chunks, threads = -(-size // 4), _threads(cell, size)
    vectors = 1 << (len(cell.gates) - 1).bit_length() if direction == "backward" else 1
    return (chunks - _held(cell, size, rows)) * threads * 16 + 2 * rows * vectors * (4 * chunks + 4) * 4
