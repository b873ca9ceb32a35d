"""Both directions of a layer at once: one node of autograd, one input product, one launch for each pass.

A small layer's time is the host's: two directions of their own are twice as many launches, and flip their inputs and
outputs. Here a backend runs them side by side (:class:`fairseq_rkm.ops.passes.Directions`), and no tensor is flipped.
Numbers are those of two directions of their own up to the order of sums: a product of both may be summed in another.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops import dispatch, reference
from fairseq_rkm.ops.alignment import align, align_rows
from fairseq_rkm.ops.cells import CANDIDATE, Cell
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.gradients import cut_columns, sigma_gradients
from fairseq_rkm.ops.higher_derivatives import gradients_through, without_autocast, zeros_for_none
from fairseq_rkm.ops.ngram import project, project_backward
from fairseq_rkm.ops.passes import Directions, Gradients
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.problem_checks import laid_out
from fairseq_rkm.ops.weights import Weights

FIELDS = len(Weights._fields)


class Layer(NamedTuple):
    """Both directions of a layer, along time and against it.

    Attributes:
        cell: the cell.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        inputs: extended inputs along time, ``(T + n - 1, B, m)``.
        others: those against time, in the order of time (:func:`fairseq_rkm.ops.ngram.extend_against_time`). None for
            n = 1: they are the same.
        hidden: the initial hidden states, ``(2, B, d)``, or None for zeros.
        memory: the initial memories, ``(2, B, d)``, or None for zeros.
        weights: the weights of both.
    """

    cell: Cell
    keep: Tensor | None
    inputs: Tensor
    others: Tensor | None
    hidden: Tensor | None
    memory: Tensor | None
    weights: tuple[Weights, Weights]

    @classmethod
    def of(cls, cell: Cell, keep: Tensor | None, arguments: Sequence[Any]) -> "Layer":
        """Undo :meth:`arguments`."""
        inputs, others, hidden, memory, *fields = arguments
        weights = Weights(*fields[:FIELDS]), Weights(*fields[FIELDS:])
        return cls(cell, keep, inputs, others, hidden, memory, weights)

    def arguments(self) -> list[Any]:
        """All that may have a gradient, in one list."""
        along, against = self.weights
        return [self.inputs, self.others, self.hidden, self.memory, *along, *against]

    def inputs_of(self, direction: int) -> Tensor:
        """The extended inputs of one direction, in the order of time."""
        return self.others if direction and self.others is not None else self.inputs

    def states_of(self, direction: int) -> tuple[Tensor | None, Tensor | None]:
        """The initial hidden state and memory of one direction, ``(B, d)``."""
        hidden, memory = self.hidden, self.memory
        return None if hidden is None else hidden[direction], None if memory is None else memory[direction]


def runs_at_once(backend: str, cell: Cell, x: Tensor, size: int) -> bool:
    """Whether both directions of a layer without layer normalisation run at once.

    Args:
        backend: ``"auto"`` or a backend's name.
        cell: the cell.
        x: its inputs, ``(T, B, m)``.
        size: d.
    """
    if not x.is_cuda or not x.numel() or not cell.has_feedback:
        return False
    if backend != "auto":
        return dispatch.BACKENDS[backend].directions is not None
    key = cell.key, x.size(1), x.dtype, x.device, size, torch.backends.cudnn.allow_tf32
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        rows = len(cell.gates), len(cell.recurrent_gates)
        # The choice does not depend on the number of features.
        like = Weights(*(torch.empty(count * size, size, device="meta") for count in rows))
        sketch = x.new_empty(1, x.size(1), size)
        _KNOWN[key] = dispatch.pick(backend, cell, sketch, like).directions is not None
    return _KNOWN[key]


_KNOWN: dict[tuple[Any, ...], bool] = {}
MOST_KNOWN = 4096


def recurrence(layer: Layer, size: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run both directions at once, or one after the other where tensors or tools are not for hand-written passes.

    Args:
        layer: the layer.
        size: d.
        backend: ``"auto"`` or a backend's name.

    Returns:
        The output, ``(T, B, 2 * d)``, zero at padding; the final hidden states and memories, ``(2, B, d)`` each.

    Raises:
        RKMError: as :func:`fairseq_rkm.ops.dispatch.recurrence`.
    """
    cell, keep = layer.cell, layer.keep
    directions = None
    if are_plain(keep, *(value for value in layer.arguments() if not isinstance(value, float))):
        chosen = [
            dispatch.proven(backend, cell, layer.inputs_of(number), weights, size, *layer.states_of(number), keep)
            for number, weights in enumerate(layer.weights)
        ]
        directions = chosen[0].directions if chosen[0] is chosen[1] else None
    if directions is None:

        def run(cell: Cell, inputs: Tensor, weights: Weights, *state_and_keep: Tensor | None) -> Sequence[Tensor]:
            return dispatch.recurrence(cell, inputs, weights, size, *state_and_keep, backend)  # type: ignore[call-arg, arg-type]

        return in_turn(layer, run)
    layer = _laid_out(layer)
    if torch.is_grad_enabled():
        return _apply(directions, cell, layer.keep, *layer.arguments())
    results = _forward(directions, layer)
    return results[0], results[1], results[2]


def in_turn(layer: Layer, run: Callable[..., Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`recurrence`, one direction after the other.

    Args:
        layer: the layer.
        run: a recurrence: ``(cell, inputs, weights, hidden, memory, keep)`` to output, hidden and memory.
    """
    along, against = layer.weights
    first = run(layer.cell, layer.inputs, along, *layer.states_of(0), layer.keep)
    keep = None if layer.keep is None else layer.keep.flip(0)
    second = run(layer.cell, layer.inputs_of(1).flip(0), against, *layer.states_of(1), keep)
    states = [torch.stack(pair) for pair in zip(first[1:], second[1:], strict=True)]
    return torch.cat([first[0], second[0].flip(0)], dim=2), states[0], states[1]


def _laid_out(layer: Layer) -> Layer:
    """The same layer, contiguous and in the dtypes of the computation."""
    inputs, others, hidden, memory, (along, against) = layer[2:]
    if all(
        dispatch.is_laid_out(layer.inputs_of(i), weights, hidden, memory) for i, weights in enumerate(layer.weights)
    ):
        return layer
    inputs, along, hidden, memory = laid_out(inputs, along, hidden, memory)
    _, against, _, _ = laid_out(inputs, against, None, None)
    others = None if others is None else others.contiguous()
    return Layer(layer.cell, layer.keep, inputs, others, hidden, memory, (along, against))


def _forward(directions: Directions, layer: Layer) -> tuple[Any, ...]:
    """The results of :func:`recurrence`, and what the backward pass needs: gates, all h and c, the joint matrix."""
    along, against = layer.weights
    matrix = None
    if layer.others is None:
        matrix = torch.cat((along.input, against.input))
        gates = project(layer.inputs, matrix, None)
    else:
        steps = layer.inputs.size(0) + 1 - along.input.size(1) // layer.inputs.size(2)
        width, batch = along.input.size(0), layer.inputs.size(1)
        gates = layer.inputs.new_empty(steps, batch, 2 * width)
        for number, weights in enumerate(layer.weights):
            into = gates.view(-1, 2, width)[:, number]
            project(layer.inputs_of(number), weights.input, None, out=into, against_time=bool(number))
    output, hidden, memory, hiddens, memories = directions.forward(
        layer.cell, layer.weights, layer.keep, gates, layer.hidden, layer.memory
    )
    return output, hidden, memory, gates, hiddens, memories, matrix


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, directions: Directions, cell: Cell, keep: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, hidden, memory, *own = _forward(directions, Layer.of(cell, keep, arguments))
        ctx.set_materialize_grads(False)
        # The Function holds no tensors but by save_for_backward.
        ctx.directions, ctx.cell = directions, cell
        ctx.numbers = [value if isinstance(value, float) else None for value in arguments]
        tensors = [None if isinstance(value, float) else value for value in arguments]
        ctx.save_for_backward(keep, *own, *tensors)
        return output, hidden, memory

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[3:]
        if grads[0] is None and grads[1] is None and grads[2] is None:
            return (None,) * (3 + len(needs))
        keep, gates, hiddens, memories, matrix, *tensors = ctx.saved_tensors
        arguments = [t if number is None else number for number, t in zip(ctx.numbers, tensors, strict=True)]
        layer = Layer.of(ctx.cell, keep, arguments)
        with without_autocast(layer.inputs.device.type):
            if torch.is_grad_enabled() or not are_plain(*grads):
                return None, None, None, *_by_reference(layer, grads, needs)
            own = gates, hiddens, memories, matrix
            return None, None, None, *_Backward(ctx.directions, layer, own, grads, needs).run()


class _Backward:
    """The backward pass.

    Args:
        directions: the backend's.
        layer: laid out.
        own: as :func:`_forward` gives it.
        grads: the gradients of output, hidden states and memories; None for zeros.
        needs: True for each of :meth:`Layer.arguments` whose gradient is wanted.
    """

    def __init__(
        self, directions: Directions, layer: Layer, own: tuple[Any, ...], grads: Gradients, needs: Sequence[bool]
    ) -> None:
        self.layer, (self.gates, self.hiddens, self.memories, self.matrix) = layer, own
        self.needs = needs
        self.width, self.size = self.gates.size(2) // 2, self.hiddens.size(2) // 2
        self.grad_gates, self.grad_hidden, self.grad_memory = directions.backward(
            layer.cell, layer.weights, layer.keep, self.gates, self.memories, grads
        )
        self.rows = self.grad_gates.view(-1, 2 * self.width)

    def run(self) -> Gradients:
        """The gradients of :meth:`Layer.arguments`; None where none is wanted."""
        _, _, need_hidden, need_memory = self.needs[:4]
        inputs, others, *matrices = self._products_with_inputs()
        hidden = self.grad_hidden.to(self.hiddens.dtype) if need_hidden else None
        found: list[Tensor | None] = [inputs, others, hidden, self.grad_memory if need_memory else None]
        rest = zip(matrices, self._recurrent(), self._biases(), self._sigmas(), strict=True)
        for matrix, recurrent, bias, sigmas in rest:
            found += [matrix, recurrent, bias, None, None, *sigmas, None, None]
        return tuple(found)

    def _wants(self, field: str) -> tuple[bool, bool]:
        """Whether the gradients of a field of :class:`Weights` are wanted, along time and against it."""
        at = 4 + Weights._fields.index(field)
        return self.needs[at], self.needs[at + FIELDS]

    def _columns(self, block: slice) -> tuple[slice, slice]:
        """Where some of a direction's gates lie in :attr:`rows`."""
        return block, slice(self.width + block.start, self.width + block.stop)

    def _products_with_inputs(self) -> list[Tensor | None]:
        """The gradients of both inputs and of both input matrices."""
        layer, wants = self.layer, self._wants("input")
        if self.matrix is None:
            pairs = []
            for number, columns in enumerate(self._columns(slice(0, self.width))):
                given = layer.inputs_of(number), layer.weights[number].input
                needs = self.needs[number], wants[number], bool(number)
                pairs.append(project_backward(self.rows[:, columns], *given, *needs))
            return [grad for grads in zip(*pairs, strict=True) for grad in grads]
        inputs, matrix = align(layer.inputs, self.matrix)
        grad_inputs, grad_matrix = project_backward(self.rows, inputs, matrix, self.needs[0], any(wants))
        features = layer.inputs.size(2)
        if inputs.size(2) != features:
            grad_inputs, grad_matrix = cut_columns((grad_inputs, features), (grad_matrix, features))
        return [grad_inputs, None, *_halves(grad_matrix, wants)]

    def _recurrent(self) -> list[Tensor | None]:
        """The gradients of ``U``."""
        wants, steps = self._wants("recurrent"), self.gates.size(0)
        if not any(wants):
            return [None, None]
        (hiddens,) = align_rows(self.hiddens.view(steps + 2, -1, 2, self.size))
        before = hiddens[:steps, :, 0], hiddens[2:, :, 1]
        columns = self._columns(recurrent_slice(self.layer.cell, self.size))
        found = [
            torch.mm(self.rows[:, block].t(), states.flatten(0, 1)) if want else None
            for block, states, want in zip(columns, before, wants, strict=True)
        ]
        return found if hiddens.size(3) == self.size else cut_columns(*((grad, self.size) for grad in found))

    def _biases(self) -> list[Tensor | None]:
        wants = self._wants("bias")
        return _halves(self.rows.sum(0) if any(wants) else None, wants)

    def _sigmas(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """The gradients of ``s_i`` and ``s_f``."""
        cell, size, wide = self.layer.cell, self.size, self.memories.dtype
        reads = cell.input_is_constant, cell.forget_is_constant
        wants = list(zip(self._wants("sigma_i"), self._wants("sigma_f"), strict=True))
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for number, columns in enumerate(self._columns(gate_slices(cell, size)[CANDIDATE])):
            needs = [read and want for read, want in zip(reads, wants[number], strict=True)]
            if not any(needs):
                found.append((None, None))
                continue
            states = self.memories[:-2, :, :size] if number == 0 else self.memories[2:, :, size:]
            grad, candidate = (tensor[..., columns].to(wide) for tensor in (self.grad_gates, self.gates))
            grads = sigma_gradients(grad, candidate, states, self.layer.weights[number].sigma_i)
            found.append((grads[0] if needs[0] else None, grads[1] if needs[1] else None))
        return found


def _halves(grad: Tensor | None, needed: Sequence[Any]) -> list[Tensor | None]:
    """The rows of each direction whose gradient is wanted."""
    if grad is None:
        return [None, None]
    return [half if need else None for half, need in zip(grad.chunk(2), needed, strict=True)]


def _by_reference(layer: Layer, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """As :meth:`_Backward.run`, by the reference: the gradients may be differentiated again."""

    def run(*arguments: Any) -> Sequence[Tensor]:
        return in_turn(Layer.of(layer.cell, layer.keep, arguments), _reference)

    return gradients_through(run, layer.arguments(), grads, needs)


def _reference(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, memory = zeros_for_none(cell, inputs, weights, hidden, memory)
    return reference.recurrence(cell, inputs, weights, hidden, memory, keep)


# Function.apply looks for torch.func's transforms and tensors first. Such a call does not come here.
_apply = super(torch.autograd.Function, _Recurrence).apply
