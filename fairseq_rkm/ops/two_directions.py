"""Both directions of layers at once: one node of autograd a stack, one input product a layer, one launch a pass.

A small layer's time is the host's: two directions of their own are twice as many launches, and flip their inputs and
outputs. Here a backend runs them side by side (:class:`fairseq_rkm.ops.passes.Directions`), and no tensor is flipped.
Numbers are those of two directions of their own up to the order of sums: a product for both may sum in another.

Every call here is felt: a stack of small layers keeps the host busier than the GPU. Tensors of a layer are therefore
found by their addresses in those of the stack, where kernels and ``as_strided`` can.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.alignment import align, align_rows
from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.gradients import cut_columns, sigma_gradients
from fairseq_rkm.ops.higher_derivatives import gradients_through, recurrence_by_reference, without_autocast
from fairseq_rkm.ops.ngram import project, project_backward
from fairseq_rkm.ops.passes import Directions, Gradients
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.problem_checks import laid_out
from fairseq_rkm.ops.weights import Weights, memory_dtype

Pair = tuple[Weights, Weights]
"""The weights along time and against it."""


class Stack(NamedTuple):
    """Layers in both directions, without layer normalisation; several of them only for n = 1.

    Attributes:
        cell: the cell of all layers.
        size: d.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        inputs: the first layer's extended inputs along time, ``(T + n - 1, B, m)``.
        others: those against time, in the order of time (:func:`fairseq_rkm.ops.ngram.extend_against_time`). None for
            n = 1: they are the same.
        hidden: the initial hidden states, ``(2 * L, B, d)``, or None for zeros.
        memory: the initial memories, ``(2 * L, B, d)``, or None for zeros.
        masks: what each layer's inputs are multiplied by, ``(1, B, 2 * d)``: dropout. None is no dropout; the first
            layer has none.
        layers: the weights of each layer.
    """

    cell: Cell
    size: int
    keep: Tensor | None
    inputs: Tensor
    others: Tensor | None
    hidden: Tensor | None
    memory: Tensor | None
    masks: Sequence[Tensor | None]
    layers: Sequence[Pair]

    @property
    def steps(self) -> int:
        """T."""
        if self.others is None:
            return self.inputs.size(0)
        return self.inputs.size(0) + 1 - self.layers[0][0].input.size(1) // self.inputs.size(2)

    def inputs_of(self, direction: int) -> Tensor:
        """The first layer's extended inputs of a direction, in the order of time."""
        return self.others if direction and self.others is not None else self.inputs

    def states_of(self, number: int, direction: int) -> tuple[Tensor | None, Tensor | None]:
        """The initial hidden state and memory of a layer and direction, ``(B, d)``."""
        at = 2 * number + direction
        return None if self.hidden is None else self.hidden[at], None if self.memory is None else self.memory[at]

    def arguments(self) -> list[Any]:
        """All that may have a gradient, and the masks, in one list; numbers are left out."""
        found: list[Any] = [self.inputs, self.others, self.hidden, self.memory, *self.masks]
        for pair in self.layers:
            for matrix, recurrent, bias, _, _, s_i, s_f, _, _ in pair:
                found += (
                    matrix, recurrent, bias, s_i if isinstance(s_i, Tensor) else None,
                    s_f if isinstance(s_f, Tensor) else None,
                )  # fmt: skip
        return found

    def numbers(self) -> list[Any]:
        """``s_i`` and ``s_f`` along time and against it, of each layer; None for a tensor."""
        values = [value for pair in self.layers for weights in pair for value in weights[5:7]]
        return [value if isinstance(value, float) else None for value in values]

    @classmethod
    def of(
        cls, cell: Cell, size: int, keep: Tensor | None, numbers: Sequence[Any], arguments: Sequence[Any]
    ) -> "Stack":
        """Undo :meth:`arguments` and :meth:`numbers`."""
        count = len(numbers) // 4
        inputs, others, hidden, memory, *rest = arguments
        weights = []
        for at in range(2 * count):
            matrix, recurrent, bias, s_i, s_f = rest[count + FIELDS * at : count + FIELDS * (at + 1)]
            s_i = numbers[2 * at] if s_i is None else s_i
            s_f = numbers[2 * at + 1] if s_f is None else s_f
            weights.append(Weights(matrix, recurrent, bias, None, None, s_i, s_f))
        layers = list(zip(weights[::2], weights[1::2], strict=True))
        return cls(cell, size, keep, inputs, others, hidden, memory, rest[:count], layers)


ALIGNED_BYTES = 16
"""The rows of matrices that need no copy for fast products (:mod:`fairseq_rkm.ops.alignment`)."""
FIELDS = 5
"""The fields of :class:`Weights` that a layer here may have."""
FIRST_FIELD = 4
"""Of :meth:`Stack.arguments`, those before the masks; one mask a layer follows, and the weights."""


def runs_at_once(backend: str, cell: Cell, x: Tensor, size: int) -> bool:
    """Whether both directions of a layer without layer normalisation run at once; through other kernels none does.

    Args:
        backend: ``"auto"`` or a backend's name.
        cell: the cell.
        x: its inputs, ``(T, B, m)``.
        size: d.
    """
    if not x.is_cuda or not x.numel() or not cell.has_feedback or not cell.kernel.is_linear:
        return False
    if backend != "auto":
        return dispatch.BACKENDS[backend].directions is not None
    return _automatic(cell, x, size) is not None


def _automatic(cell: Cell, x: Tensor, size: int) -> str | None:
    """The backend that ``"auto"`` stands for where both directions run at once; None where they run in turn."""
    key = cell.key, x.size(0), x.size(1), x.dtype, x.device, size, dispatch.tf32(x)
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = _faster_at_once(cell, x, size)
    return _KNOWN[key]


def _faster_at_once(cell: Cell, x: Tensor, size: int) -> str | None:
    """See :func:`_automatic`: by estimates, a layer of both directions being one of twice the batch."""
    counts = len(cell.gates), len(cell.recurrent_gates)
    like = Weights(*(torch.empty(count * size, size, device="meta") for count in counts))
    # The choice does not depend on the number of features.
    one, both = (x.new_empty(1).expand(x.size(0), batch, size) for batch in (x.size(1), 2 * x.size(1)))
    picked = dispatch.pick("auto", cell, one, like)
    in_turn = math.inf if picked.step_time is None else 2 * picked.step_time(cell, one, like)
    for name, backend in dispatch.BACKENDS.items():
        if backend is picked and backend.directions is not None:
            return name
        if backend.directions is None or backend.step_time is None or backend.refuses(cell, both, like) is not None:
            continue
        if backend.step_time(cell, both, like) < in_turn:
            return name
    return None


_KNOWN: dict[tuple[Any, ...], str | None] = {}
MOST_KNOWN = 4096


def recurrence(stack: Stack, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run both directions at once, or one after the other where tensors or tools are not for hand-written passes.

    Args:
        stack: the layers.
        backend: ``"auto"`` or a backend's name.

    Returns:
        The last layer's output, ``(T, B, 2 * d)``, zero at padding; the final hidden states and memories,
        ``(2 * L, B, d)`` each.

    Raises:
        RKMError: as :func:`fairseq_rkm.ops.dispatch.recurrence`.
    """
    arguments = stack.arguments()
    directions, laid_out = None, True
    if are_plain(stack.keep, *arguments):
        directions, laid_out = _proven(stack, arguments, backend)
    if directions is None:

        def run(cell: Cell, inputs: Tensor, weights: Weights, *state_and_keep: Tensor | None) -> Sequence[Tensor]:
            return dispatch.recurrence(cell, inputs, weights, stack.size, *state_and_keep, backend)  # type: ignore[call-arg, arg-type]

        return in_turn(stack, run)
    if not laid_out:
        stack = _laid_out(stack)
        arguments = stack.arguments()
    if torch.is_grad_enabled():
        return _apply(directions, stack, stack.keep, *arguments)
    return _Forward(directions, stack).results()


class _Proven(NamedTuple):
    """What checks found of a kind of stack: its passes, and whether all tensors have the dtypes of the computation."""

    directions: Directions | None
    typed: bool


_PROVEN: dict[tuple[Any, ...], _Proven] = {}
"""The kinds of stacks that passed all checks, by all that checks and choice depend on."""


def _proven(stack: Stack, arguments: Sequence[Tensor | None], backend: str) -> tuple[Directions | None, bool]:
    """The passes for plain tensors, after all checks, and whether the tensors lie as kernels read them.

    No passes are for directions that run in turn. Checks are made once for each kind of stack.
    """
    inputs, others, keep, steps = stack.inputs, stack.others, stack.keep, stack.steps
    kind: list[Any] = [
        str(backend), stack.cell.key, stack.size, dispatch.tf32(inputs), min(steps, 2), inputs.shape[1:], inputs.dtype,
        inputs.device, keep is None or (keep.shape == (steps, inputs.size(1)), keep.dtype, keep.device),
        others is None or (others.shape == inputs.shape, others.dtype, others.device), len(stack.layers),
    ]  # fmt: skip
    contiguous = all(tensor is None or tensor.is_contiguous() for tensor in (inputs, others, keep))
    for tensor in arguments[2:]:
        if tensor is None:
            kind.append(None)
            continue
        kind += (tensor.shape, tensor.dtype, tensor.device)
        contiguous = contiguous and tensor.is_contiguous()
    key = tuple(kind)
    found = _PROVEN.get(key)
    if found is None:
        found = _prove(stack, backend)
        if len(_PROVEN) >= MOST_KNOWN:
            _PROVEN.clear()
        _PROVEN[key] = found
    return found.directions, contiguous and found.typed


def _prove(stack: Stack, backend: str) -> _Proven:
    """Make all checks of a stack."""
    chosen = []
    if backend == "auto" and stack.inputs.is_cuda:
        backend = _automatic(stack.cell, stack.inputs, stack.size) or backend
    above = stack.inputs.new_empty(1).expand(stack.steps, stack.inputs.size(1), 2 * stack.size)
    for number, pair in enumerate(stack.layers):
        for direction, weights in enumerate(pair):
            inputs = above if number else stack.inputs_of(direction)
            states = stack.states_of(number, direction)
            chosen.append(dispatch.proven(backend, stack.cell, inputs, weights, stack.size, *states, stack.keep))
    typed = all(
        dispatch.is_laid_out(stack.inputs, weights, *stack.states_of(number, direction))
        for number, pair in enumerate(stack.layers)
        for direction, weights in enumerate(pair)
    )
    one = all(backend is chosen[0] for backend in chosen)
    return _Proven(chosen[0].directions if one else None, typed)


def in_turn(stack: Stack, run: Callable[..., Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`recurrence`, one direction after the other.

    Args:
        stack: the layers.
        run: a recurrence: ``(cell, inputs, weights, hidden, memory, keep)`` to output, hidden and memory.
    """
    keep = stack.keep
    back = None if keep is None else keep.flip(0)
    states: list[Sequence[Tensor]] = []
    inputs, others = stack.inputs, stack.inputs_of(1)
    for number, (along, against) in enumerate(stack.layers):
        first = run(stack.cell, inputs, along, *stack.states_of(number, 0), keep)
        second = run(stack.cell, others.flip(0), against, *stack.states_of(number, 1), back)
        states += [first[1:], second[1:]]
        output = torch.cat([first[0], second[0].flip(0)], dim=2)
        if number + 1 < len(stack.layers):
            mask = stack.masks[number + 1]
            inputs = others = output if mask is None else output * mask
    hidden, memory = (torch.stack(tensors) for tensors in zip(*states, strict=True))
    return output, hidden, memory


def _laid_out(stack: Stack) -> Stack:
    """The same stack, contiguous and in the dtypes of the computation."""
    wide = memory_dtype(stack.inputs.dtype)
    inputs, _, hidden, memory = laid_out(stack.inputs, stack.layers[0][0], stack.hidden, stack.memory)
    keep, others = (None if tensor is None else tensor.contiguous() for tensor in (stack.keep, stack.others))
    layers = [(along.laid_out(wide), against.laid_out(wide)) for along, against in stack.layers]
    return Stack(stack.cell, stack.size, keep, inputs, others, hidden, memory, stack.masks, layers)


class _Forward:
    """The forward pass, and what the backward pass needs of it.

    Attributes:
        hiddens: all h, ``(L, T + 2, B, 2 * d)``, and ``memories``: all c (:class:`Directions`).
        inputs: of each layer; None for those that are its ``hiddens`` or the stack's.
        matrices: of each layer, both directions' input weights in one; None where windows of the two differ.
        gates: of each layer, activated, ``(T, B, 2 * G * d)``.
    """

    def __init__(self, directions: Directions, stack: Stack) -> None:
        cell, size, keep, inputs, _, hidden, memory, masks, layers = stack
        steps, batch, count = stack.steps, inputs.size(1), len(layers)
        dtype = inputs.dtype
        wide = dtype if dtype.itemsize >= torch.float32.itemsize else torch.float32
        self.hiddens = inputs.new_empty((count, steps + 2, batch, 2 * size))
        self.memories = inputs.new_empty((count, steps + 2, batch, 2 * size), dtype=wide)
        self.last = inputs.new_empty((2 * count, batch, size)), inputs.new_empty((2 * count, batch, size), dtype=wide)
        self.inputs: list[Tensor | None] = []
        self.matrices: list[Tensor | None] = []
        self.gates: list[Tensor] = []
        x, output = inputs, None
        for number, pair in enumerate(layers):
            mask = masks[number]
            if number:
                x = _outputs(self.hiddens, number - 1) if output is None else output
                x = x if mask is None else x * mask
            self.inputs.append(x if output is not None or mask is not None else None)
            gates, matrix = _products(stack, pair) if stack.others is not None else _product(x, pair)
            self.matrices.append(matrix)
            self.gates.append(gates)
            # Of the layers within, outputs are all h, but for zeros at padding. The last one's are the user's alone.
            apart = keep is not None or number + 1 == count
            output = inputs.new_empty((steps, batch, 2 * size)) if apart else None
            directions.forward(
                cell, pair, keep, gates, number, (hidden, memory), self.last, self.hiddens, self.memories, output
            )
        self.output = output

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The results of :func:`recurrence`."""
        return self.output, *self.last  # type: ignore[return-value]


def _outputs(hiddens: Tensor, number: int) -> Tensor:
    """All h of a layer, without the initial ones: ``(T, B, 2 * d)``."""
    _, rows, batch, width = hiddens.shape
    row = batch * width
    return hiddens.as_strided((rows - 2, batch, width), (row, width, 1), (number * rows + 1) * row)


def _product(x: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """``W X`` of both directions for n = 1, ``(T, B, 2 * G * d)``, and the matrix ``W`` of both."""
    matrix = torch.cat((pair[0].input, pair[1].input))
    return F.linear(*align(x, matrix)), matrix


def _products(stack: Stack, pair: Pair) -> tuple[Tensor, None]:
    """``W X`` of both directions, whose windows differ."""
    width = pair[0].input.size(0)
    gates = stack.inputs.new_empty((stack.steps, stack.inputs.size(1), 2 * width))
    for direction, weights in enumerate(pair):
        into = gates.view(-1, 2, width)[:, direction]
        project(stack.inputs_of(direction), weights.input, None, out=into, against_time=bool(direction))
    return gates, None


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, directions: Directions, stack: Stack, keep: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _Forward(directions, stack)
        ctx.set_materialize_grads(False)
        # The Function holds no tensors but by save_for_backward.
        ctx.directions, ctx.cell, ctx.size, ctx.numbers = directions, stack.cell, stack.size, stack.numbers()
        ctx.save_for_backward(
            keep, run.hiddens, run.memories, *run.inputs, *run.matrices, *run.gates, *arguments
        )  # fmt: skip
        return run.results()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[3:]
        if grads[0] is None and grads[1] is None and grads[2] is None:
            return (None,) * (3 + len(needs))
        keep, hiddens, memories, *saved = ctx.saved_tensors
        count = hiddens.size(0)
        stack = Stack.of(ctx.cell, ctx.size, keep, ctx.numbers, saved[3 * count :])
        with without_autocast(hiddens.device.type):
            if torch.is_grad_enabled() or not are_plain(*grads):
                return None, None, None, *_by_reference(stack, grads, needs)
            own = hiddens, memories, saved[:count], saved[count : 2 * count], saved[2 * count : 3 * count]
            return None, None, None, *_Backward(ctx.directions, stack, own, grads, needs).run()


class _Backward:
    """The backward pass.

    Args:
        directions: the backend's.
        stack: laid out.
        own: the attributes of :class:`_Forward`.
        grads: the gradients of output, hidden states and memories; None for zeros.
        needs: True for each of :meth:`Stack.arguments` whose gradient is wanted.
    """

    def __init__(
        self, directions: Directions, stack: Stack, own: tuple[Any, ...], grads: Gradients, needs: Sequence[bool]
    ) -> None:
        self.directions, self.stack, self.needs = directions, stack, needs
        self.hiddens, self.memories, self.inputs, self.matrices, self.gates = own
        self.width, wide = self.gates[0].size(2) // 2, self.memories.dtype
        grad_output, *last = grads
        self.grad_output = None if grad_output is None else grad_output.contiguous()
        self.last = [None if grad is None else grad.to(wide).contiguous() for grad in last]
        self.first = self.memories.new_empty((2, 2 * len(stack.layers), self.hiddens.size(2), stack.size))

    def run(self) -> Gradients:
        """The gradients of :meth:`Stack.arguments`; None where none is wanted."""
        stack, needs = self.stack, self.needs
        _, _, need_hidden, need_memory = needs[:FIRST_FIELD]
        fields: list[list[Tensor | None]] = []
        grad_inputs: tuple[Tensor | None, Tensor | None] = (None, None)
        for number in reversed(range(len(stack.layers))):
            grad_gates = torch.empty_like(self.gates[number])
            self.directions.backward(
                stack.cell, stack.layers[number], stack.keep, self.gates[number], number, self.memories,
                self.grad_output, self.last, self.first, grad_gates,
            )  # fmt: skip
            grad_inputs, grads = self._of_layer(number, grad_gates)
            fields.append(grads)
            if number:
                grad, mask = grad_inputs[0].contiguous(), stack.masks[number]  # type: ignore[union-attr]
                self.grad_output = grad if mask is None else grad.mul_(mask)
        found: list[Tensor | None] = [*grad_inputs, self.first[0].to(self.hiddens.dtype) if need_hidden else None]
        found += [self.first[1] if need_memory else None, *(None for _ in stack.layers)]
        for grads in reversed(fields):
            found += grads
        return tuple(found)

    def _of_layer(
        self, number: int, grad_gates: Tensor
    ) -> tuple[tuple[Tensor | None, Tensor | None], list[Tensor | None]]:
        """The gradients of a layer's inputs, along time and against it, and of its weights."""
        start = FIRST_FIELD + len(self.stack.layers) + 2 * FIELDS * number
        along, against = self.needs[start : start + FIELDS], self.needs[start + FIELDS : start + 2 * FIELDS]
        wants = list(zip(along, against, strict=True))
        rows = grad_gates.view(-1, 2 * self.width)
        grad_inputs, matrices = self._with_inputs(number, rows, wants[0])
        recurrent = self._recurrent(number, rows, wants[1])
        biases = _halves(rows.sum(0) if any(wants[2]) else None, wants[2])
        sigmas = self._sigmas(number, grad_gates, wants[3:])
        fields: list[Tensor | None] = []
        for direction in range(2):
            fields += (matrices[direction], recurrent[direction], biases[direction], *sigmas[direction])
        return grad_inputs, fields

    def _columns(self, block: slice) -> tuple[slice, slice]:
        """Where some of a direction's gates lie in rows of both, along time and against it."""
        return block, slice(self.width + block.start, self.width + block.stop)

    def _with_inputs(
        self, number: int, rows: Tensor, wants: tuple[bool, bool]
    ) -> tuple[tuple[Tensor | None, Tensor | None], Sequence[Tensor | None]]:
        """The gradients of both inputs, and of both input matrices."""
        stack, matrix = self.stack, self.matrices[number]
        if matrix is None:
            pairs = []
            for direction, columns in enumerate(self._columns(slice(0, self.width))):
                given = stack.inputs_of(direction), stack.layers[number][direction].input
                needs = self.needs[direction], wants[direction], bool(direction)
                pairs.append(project_backward(rows[:, columns], *given, *needs))
            inputs, matrices = zip(*pairs, strict=True)
            return inputs, matrices
        x = self.inputs[number]
        if x is None:
            x = _outputs(self.hiddens, number - 1) if number else stack.inputs
        features = x.size(2)
        x, matrix = align(x, matrix)
        need_inputs = number > 0 or self.needs[0]
        grad_inputs, grad_matrix = project_backward(rows, x, matrix, need_inputs, wants[0] or wants[1])
        if x.size(2) != features:
            grad_inputs, grad_matrix = cut_columns((grad_inputs, features), (grad_matrix, features))
        return (grad_inputs, None), _halves(grad_matrix, wants)

    def _recurrent(self, number: int, rows: Tensor, wants: tuple[bool, bool]) -> Sequence[Tensor | None]:
        """The gradients of ``U``."""
        size, hiddens = self.stack.size, self.hiddens
        _, length, batch, width = hiddens.shape
        start, pitch = number * length * batch * width, size
        if size * hiddens.element_size() % ALIGNED_BYTES:
            (hiddens,) = align_rows(hiddens[number].view(length, batch, 2, size))
            start, pitch = 0, hiddens.size(3)
        block, count = recurrent_slice(self.stack.cell, size), rows.size(0)
        found: list[Tensor | None] = [None, None]
        for direction in range(2):
            if wants[direction]:
                at = direction * self.width + block.start
                gates = rows.as_strided((block.stop - block.start, count), (1, 2 * self.width), at)
                # The states before the step at time t lie at t, those against time at t + 2.
                at = start + direction * (4 * batch + 1) * pitch
                found[direction] = torch.mm(gates, hiddens.as_strided((count, pitch), (2 * pitch, 1), at))
        return found if pitch == size else cut_columns(*((grad, size) for grad in found))

    def _sigmas(
        self, number: int, grad_gates: Tensor, wants: Sequence[tuple[bool, bool]]
    ) -> Sequence[tuple[Tensor | None, Tensor | None]]:
        """The gradients of ``s_i`` and ``s_f``, along time and against it."""
        cell, size, wide = self.stack.cell, self.stack.size, self.memories.dtype
        reads = cell.input_is_constant, cell.forget_is_constant
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (None, None)]
        if not any(reads):
            return found
        memories, gates = self.memories[number], self.gates[number]
        before = memories[:-2, :, :size], memories[2:, :, size:]
        for direction, columns in enumerate(self._columns(gate_slices(cell, size)[CANDIDATE])):
            needs = [read and want[direction] for read, want in zip(reads, wants, strict=True)]
            if any(needs):
                grad, candidate = (tensor[..., columns].to(wide) for tensor in (grad_gates, gates))
                sigma_i = self.stack.layers[number][direction].sigma_i
                to_i, to_f = sigma_gradients(grad, candidate, before[direction], sigma_i)
                found[direction] = to_i if needs[0] else None, to_f if needs[1] else None
        return found


def _halves(grad: Tensor | None, wants: tuple[bool, bool]) -> Sequence[Tensor | None]:
    """The rows of each direction whose gradient is wanted."""
    if grad is None:
        return None, None
    along, against = grad.chunk(2)
    return along if wants[0] else None, against if wants[1] else None


def _by_reference(stack: Stack, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """As :meth:`_Backward.run`, by the reference: the gradients may be differentiated again."""
    numbers = stack.numbers()

    def run(*arguments: Any) -> Sequence[Tensor]:
        return in_turn(Stack.of(stack.cell, stack.size, stack.keep, numbers, arguments), recurrence_by_reference)

    return gradients_through(run, stack.arguments(), grads, needs)


# Function.apply looks for torch.func's transforms and tensors first. Such a call does not come here.
_apply = super(torch.autograd.Function, _Recurrence).apply
