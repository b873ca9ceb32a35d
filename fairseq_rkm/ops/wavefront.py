"""Layers of a stack side by side: while a layer works at a stretch of time, the next one works at the stretch before.

A small layer takes a few of a GPU's multiprocessors, and a step of it cannot be divided any further. In the plain order
the layers run one after another, and most of the GPU is idle. Here time is cut into stretches, layers have streams of
their own, and L layers over k stretches take the time of k + L - 1 stretches in place of L k. The backward pass goes
the other way: from the last layer's last stretch to the first layer's first.

One node of autograd stands for the whole stack. It writes into the same memory as the plain order does, stretch by
stretch. The gradients of weights are those of the plain order, one product over all steps each. Numbers are the plain
order's up to the products of fewer rows, for which cuBLAS may choose another order of sums.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops import dispatch
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.higher_derivatives import gradients_through, recurrence_by_reference, without_autocast
from fairseq_rkm.ops.ngram import add_input_gradients, extend, project
from fairseq_rkm.ops.passes import Gradients
from fairseq_rkm.ops.plain_tensors import are_plain
from fairseq_rkm.ops.problem_checks import check, laid_out
from fairseq_rkm.ops.side_streams import Lanes
from fairseq_rkm.ops.wavefront_plan import Plan
from fairseq_rkm.ops.weights import Weights, memory_dtype

_Results = tuple[Tensor, Tensor, Tensor]


class Layer(NamedTuple):
    """A layer of a stack.

    Attributes:
        hidden: the initial hidden state, ``(B, d)``, or None for zeros.
        memory: the initial memory, ``(B, d)``, or None for zeros.
        mask: what its inputs are multiplied by, ``(1, B, d)``: dropout. None is no dropout.
        context: its inputs before the first step, ``(n - 1, B, d)``; None for zeros. The first layer's are in its
            inputs.
        weights: its weights.
    """

    hidden: Tensor | None
    memory: Tensor | None
    mask: Tensor | None
    context: Tensor | None
    weights: Weights

    def fields(self) -> list[Any]:
        """All of it in one list."""
        return [*self[:4], *self.weights]

    @classmethod
    def of(cls, fields: Sequence[Any]) -> "Layer":
        """Undo :meth:`fields`."""
        hidden, memory, mask, context, *rest = fields
        return cls(hidden, memory, mask, context, Weights(*rest))


FIELDS = 4 + len(Weights._fields)


class Stack(NamedTuple):
    """Layers of one direction and one cell, with causal windows, and what they run on.

    Attributes:
        cell: the cell of all layers.
        size: d.
        ngram: n.
        keep: ``(T, B)`` bool, True at real steps; None if all are.
        inputs: the first layer's extended inputs, ``(T + n - 1, B, m)``.
        layers: the layers; the first one has neither mask nor context.
    """

    cell: Cell
    size: int
    ngram: int
    keep: Tensor | None
    inputs: Tensor
    layers: list[Layer]

    @property
    def steps(self) -> int:
        """T."""
        return self.inputs.size(0) - self.ngram + 1

    def arguments(self) -> list[Any]:
        """The inputs and the fields of all layers."""
        return [self.inputs, *(field for layer in self.layers for field in layer.fields())]

    def of(self, inputs: Tensor, *fields: Any) -> "Stack":
        """Undo :meth:`arguments`."""
        starts = range(0, len(fields), FIELDS)
        return self._replace(inputs=inputs, layers=[Layer.of(fields[at : at + FIELDS]) for at in starts])


def recurrence(stack: Stack, backend: str, plan: Plan) -> list[Tensor]:
    """Run a stack side by side, or in the plain order where tensors or tools are not for hand-written passes.

    Args:
        stack: the layers and their inputs.
        backend: ``"auto"`` or a backend's name, for the plain order.
        plan: how to run side by side.

    Returns:
        The last layer's output, ``(T, B, d)``, zero at padding; the final hidden states and memories, ``(L, B, d)``
        each; and for n > 1 the inputs of the second layer and of those above, ``(T, B, d)`` each.

    Raises:
        RKMError: as :func:`fairseq_rkm.ops.dispatch.recurrence`.
    """
    for number, layer in enumerate(stack.layers):
        above = stack.inputs.new_empty(1).expand(stack.inputs.size(0), stack.inputs.size(1), stack.size)
        given = above if number else stack.inputs
        check(stack.cell, given, layer.weights, stack.size, layer.hidden, layer.memory, stack.keep)
    if not are_plain(stack.keep, *(value for value in stack.arguments() if not isinstance(value, float))):

        def run(cell: Cell, inputs: Tensor, weights: Weights, *state_and_keep: Tensor | None) -> _Results:
            return dispatch.recurrence(cell, inputs, weights, stack.size, *state_and_keep, backend)  # type: ignore[call-arg, arg-type]

        return in_order(stack, run)
    stack = _laid_out(stack)
    if torch.is_grad_enabled():
        return list(_apply(stack, plan, stack.keep, *stack.arguments()))
    return _Forward(stack, plan, saves=False).run()


def in_order(stack: Stack, run: Callable[..., _Results]) -> list[Tensor]:
    """As :func:`recurrence`, one layer after another.

    Args:
        stack: the layers and their inputs.
        run: a layer's recurrence: ``(cell, inputs, weights, hidden, memory, keep)`` to output, hidden and memory.
    """
    states, inner, inputs, output = [], [], stack.inputs, stack.inputs
    for number, layer in enumerate(stack.layers):
        if number:
            x = output if layer.mask is None else output * layer.mask
            inner.append(x if stack.keep is None else x.masked_fill(~stack.keep.unsqueeze(-1), 0))
            inputs = extend(inner[-1], stack.ngram, "causal", layer.context)
        output, *state = run(stack.cell, inputs, layer.weights, layer.hidden, layer.memory, stack.keep)
        states.append(state)
    hidden, memory = (torch.stack(tensors) for tensors in zip(*states, strict=True))
    return [output, hidden, memory, *(inner if stack.ngram > 1 else [])]


def _laid_out(stack: Stack) -> Stack:
    """The same stack, contiguous and in the dtypes of the computation."""
    layers = []
    for layer in stack.layers:
        _, weights, hidden, memory = laid_out(stack.inputs, layer.weights, layer.hidden, layer.memory)
        context = None if layer.context is None else layer.context.contiguous()
        layers.append(layer._replace(weights=weights, hidden=hidden, memory=memory, context=context))
    keep = None if stack.keep is None else stack.keep.contiguous()
    return stack._replace(keep=keep, inputs=stack.inputs.contiguous(), layers=layers)


class _Buffers(NamedTuple):
    """What a layer's passes read and write, as the plain order's backends have it.

    Attributes:
        inputs: extended inputs, ``(T + n - 1, B, m)``. They may be another layer's ``hiddens``.
        hiddens: all ``h_t``, ``(T + 1, B, d)``.
        gates: ``(T, B, G * d)``, and ``memories``: all ``c_t``, ``(T + 1, B, d)``. None where nothing is kept: each
            stretch then has its own.
    """

    inputs: Tensor
    hiddens: Tensor
    gates: Tensor | None
    memories: Tensor | None


def _turns(stretches: int, layers: int) -> Iterator[tuple[int, int]]:
    """The numbers of layers and stretches, in an order in which both passes can launch them."""
    for turn in range(stretches + layers - 1):
        for layer in range(max(0, turn - stretches + 1), min(layers, turn + 1)):
            yield layer, turn - layer


def _walk(
    stack: Stack, plan: Plan, lanes: Lanes, stretches: int, work: Callable[[int, int], None], backward: bool
) -> None:  # fmt: skip
    """Run each layer's work at each stretch, behind that of the layer before it, in the direction of the pass."""
    last_layer, last_stretch = len(stack.layers) - 1, stretches - 1
    marks: dict[tuple[int, int], torch.cuda.Event] = {}
    for turn, place in _turns(stretches, len(stack.layers)):
        layer, stretch = (last_layer - turn, last_stretch - place) if backward else (turn, place)
        before = layer + 1 if backward else layer - 1
        after = (marks.pop((before, stretch)),) if (before, stretch) in marks else ()
        marks[layer, stretch] = lanes.run(plan.lane(layer), partial(work, layer, stretch), *after)


class _Forward:
    """The forward pass.

    Args:
        stack: laid out.
        plan: how to run it.
        saves: whether :attr:`buffers` hold all that a backward pass needs.
    """

    def __init__(self, stack: Stack, plan: Plan, saves: bool) -> None:
        self.stack, self.plan, self.saves = stack, plan, saves
        self.bounds = plan.bounds(stack.steps)
        inputs, batch, size, wide = stack.inputs, stack.inputs.size(1), stack.size, memory_dtype(stack.inputs.dtype)
        between = len(self.bounds) - 1, batch, size
        self.padding = None if stack.keep is None else ~stack.keep.unsqueeze(-1)
        self.hidden = inputs.new_empty(len(stack.layers), batch, size)
        self.memory = inputs.new_empty(len(stack.layers), batch, size, dtype=wide)
        self.carried = [(inputs.new_empty(between), inputs.new_empty(between, dtype=wide)) for _ in stack.layers]
        self.buffers: list[_Buffers] = []
        self.copied: list[bool] = []
        for number in range(len(stack.layers)):
            self.copied.append(number > 0 and self._copies(number))
            self.buffers.append(self._buffers(number))

    def _buffers(self, number: int) -> _Buffers:
        stack, layer = self.stack, self.stack.layers[number]
        like, steps, batch, size = stack.inputs, stack.steps, stack.inputs.size(1), stack.size
        hiddens = like.new_empty(steps + 1, batch, size)
        inputs = stack.inputs if number == 0 else self.buffers[-1].hiddens[1:]
        if self.copied[number]:
            inputs = like.new_empty(steps + stack.ngram - 1, batch, size)
            before = inputs[: stack.ngram - 1]
            _ = before.zero_() if layer.context is None else before.copy_(layer.context)
        gates = memories = None
        if number == 0:  # whole: the inputs are there
            gates = project(inputs, layer.weights.input, None)
        elif self.saves:
            gates = like.new_empty(steps, batch, layer.weights.input.size(0))
        if self.saves:
            memories = self.memory.new_empty(steps + 1, batch, size)
        return _Buffers(inputs, hiddens, gates, memories)

    def _copies(self, number: int) -> bool:
        """Whether a layer's inputs are others than all ``h_t`` of the layer below."""
        return self.stack.ngram > 1 or self.stack.layers[number].mask is not None or self.padding is not None

    def run(self) -> list[Tensor]:
        """The results of :func:`recurrence`."""
        stack = self.stack
        with Lanes(stack.inputs.device, self.plan.lanes) as lanes:
            _walk(stack, self.plan, lanes, len(self.bounds), self._stretch, backward=False)
        output = self.buffers[-1].hiddens[1:]
        if self.padding is not None:
            output = output.masked_fill(self.padding, 0)
        inner = [own.inputs[stack.ngram - 1 :] for own in self.buffers[1:]] if stack.ngram > 1 else []
        return [output, self.hidden, self.memory, *inner]

    def _stretch(self, number: int, at: int) -> None:
        stack, layer, own = self.stack, self.stack.layers[number], self.buffers[number]
        start, stop = self.bounds[at]
        if self.copied[number]:
            self._copy_inputs(number, start, stop)
        if own.gates is None:
            gates = project(own.inputs[start : stop + stack.ngram - 1], layer.weights.input, None)
        else:
            gates = own.gates[start:stop]
            if number:
                into = gates.flatten(0, 1)
                project(own.inputs[start : stop + stack.ngram - 1], layer.weights.input, None, out=into)
        memories = own.memories
        if memories is None:
            memories = self.memory.new_empty(stop - start + 1, *self.memory.shape[1:])
        else:
            memories = memories[start : stop + 1]
        hiddens, memory = self.carried[number]
        first = (layer.hidden, layer.memory) if at == 0 else (hiddens[at - 1], memory[at - 1])
        end = at == len(self.bounds) - 1
        last = (self.hidden[number], self.memory[number]) if end else (hiddens[at], memory[at])
        keep = None if stack.keep is None else stack.keep[start:stop]
        self.plan.stretches.forward(
            stack.cell, layer.weights, keep, gates, first, last, own.hiddens[start : stop + 1], memories, self.plan.rows
        )

    def _copy_inputs(self, number: int, start: int, stop: int) -> None:
        """A stretch of a layer's inputs, from all ``h_t`` of the layer below."""
        before, mask = self.stack.ngram - 1, self.stack.layers[number].mask
        into = self.buffers[number].inputs[before + start : before + stop]
        below = self.buffers[number - 1].hiddens[start + 1 : stop + 1]
        _ = into.copy_(below) if mask is None else torch.mul(below, mask, out=into)
        if self.padding is not None:
            into.masked_fill_(self.padding[start:stop], 0)


class _Backward:
    """The backward pass of :class:`_Forward`.

    Args:
        stack: laid out.
        plan: as the forward pass had it.
        buffers: of the forward pass.
        grads: the gradients of its results; None for zeros.
        needs: True for each of :meth:`Stack.arguments` whose gradient is wanted.
    """

    def __init__(
        self, stack: Stack, plan: Plan, buffers: list[_Buffers], grads: Gradients, needs: Sequence[bool]
    ) -> None:  # fmt: skip
        self.stack, self.plan, self.buffers, self.needs = stack, plan, buffers, needs
        self.bounds = plan.bounds(stack.steps)
        self.grad_output = None if grads[0] is None else grads[0].contiguous()
        wide = memory_dtype(stack.inputs.dtype)
        # Of the states before each stretch, and behind the last one.
        count, like = len(self.bounds), stack.inputs
        self.carried = [
            tuple(like.new_empty(count, like.size(1), stack.size, dtype=wide) for _ in range(2)) for _ in stack.layers
        ]
        self.last = [None if g is None else g.to(wide).contiguous() for g in grads[1:3]]
        self.grad_gates = [torch.empty_like(own.gates) for own in buffers]  # type: ignore[arg-type]
        inner = grads[3:] if stack.ngram > 1 else [None] * len(stack.layers[1:])
        self.grad_inputs = {number: self._grad_inputs(number, given) for number, given in enumerate(inner, 1)}
        self.grads: list[tuple[Tensor | None, ...]] = [()] * len(stack.layers)

    def _grad_inputs(self, number: int, given: Tensor | None) -> Tensor:
        """Memory for the gradients of a layer's extended inputs, with those that are given."""
        inputs, before = self.buffers[number].inputs, self.stack.ngram - 1
        if not before:
            return torch.empty_like(inputs)
        grad = torch.zeros_like(inputs)
        if given is not None:
            grad[before:] = given
        return grad

    def run(self) -> Gradients:
        """The gradients of :meth:`Stack.arguments`; None where none is wanted."""
        stack, plan = self.stack, self.plan
        with Lanes(stack.inputs.device, plan.lanes) as lanes:
            _walk(stack, plan, lanes, len(self.bounds), self._stretch, backward=True)
            for number in reversed(range(len(stack.layers))):  # last, so that no stretch waits for them
                lanes.run(plan.lane(number), partial(self._parameters, number))
        for number, grads in enumerate(self.grads):
            if plan.lane(number):
                lanes.hand_over(grads)
        found = [self.grads[0][0]]
        for number in range(len(stack.layers)):
            found += self._of_layer(number)
        return tuple(found)

    def _stretch(self, number: int, at: int) -> None:
        stack, layer, own = self.stack, self.stack.layers[number], self.buffers[number]
        start, stop = self.bounds[at]
        hiddens, memories = self.carried[number]
        last: list[Tensor | None] = [None if g is None else g[number] for g in self.last]
        if at < len(self.bounds) - 1:
            last = [hiddens[at + 1], memories[at + 1]]
        keep = None if stack.keep is None else stack.keep[start:stop]
        grad_gates = self.grad_gates[number][start:stop]
        self.plan.stretches.backward(
            stack.cell, layer.weights, keep, own.gates[start:stop], own.memories[start : stop + 1],  # type: ignore[index]
            self._grad_output(number, start, stop), last, (hiddens[at], memories[at]), grad_gates, self.plan.rows,
        )  # fmt: skip
        if number:
            into = self.grad_inputs[number][start : stop + stack.ngram - 1]
            add_input_gradients(grad_gates.to(into.dtype), layer.weights.input, into)

    def _grad_output(self, number: int, start: int, stop: int) -> Tensor | None:
        """The gradients of a stretch of a layer's ``h_t`` from the layer above; they may be anything at padding."""
        if number == len(self.stack.layers) - 1:
            return None if self.grad_output is None else self.grad_output[start:stop]
        before, mask = self.stack.ngram - 1, self.stack.layers[number + 1].mask
        # No earlier stretch of the layer above adds to these.
        grad = self.grad_inputs[number + 1][before + start : before + stop]
        return grad if mask is None else grad.mul_(mask)

    def _parameters(self, number: int) -> None:
        """The gradients of the first layer's inputs and of a layer's weights."""
        stack, layer, own = self.stack, self.stack.layers[number], self.buffers[number]
        first = 1 + number * FIELDS
        needs = self.needs[0] and not number, *self.needs[first + 4 : first + FIELDS]
        self.grads[number] = parameter_gradients(
            stack.cell, layer.weights, own.inputs, own.hiddens, own.memories, own.gates,  # type: ignore[arg-type]
            self.grad_gates[number], {}, needs,
        )  # fmt: skip

    def _of_layer(self, number: int) -> list[Tensor | None]:
        """The gradients of :meth:`Layer.fields`."""
        first = 1 + number * FIELDS
        need_hidden, need_memory, _, need_context = self.needs[first : first + 4]
        hiddens, memories = self.carried[number]
        return [
            hiddens[0].to(self.stack.inputs.dtype) if need_hidden else None,
            memories[0] if need_memory else None,
            None,
            self.grad_inputs[number][: self.stack.ngram - 1] if need_context else None,
            *self.grads[number][1:],
        ]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Stack, plan: Plan, keep: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        stack = stack.of(*arguments)
        run = _Forward(stack, plan, saves=True)
        results = run.run()
        ctx.set_materialize_grads(False)
        # The Function holds no tensors but by save_for_backward.
        ctx.stack, ctx.plan = stack._replace(keep=None, inputs=None, layers=[]), plan  # type: ignore[arg-type]
        ctx.numbers = {at: value for at, value in enumerate(arguments) if isinstance(value, float)}
        tensors = [None if isinstance(value, float) else value for value in arguments]
        kept = [own.inputs if copied else None for own, copied in zip(run.buffers, run.copied, strict=True)]
        ctx.save_for_backward(keep, *tensors, *kept, *(tensor for own in run.buffers for tensor in own[1:]))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(needs))
        stack, buffers = _load(ctx, len(needs))
        with without_autocast(stack.inputs.device.type):
            if torch.is_grad_enabled() or not are_plain(*grads):
                return None, None, None, *_by_reference(stack, grads, needs)
            return None, None, None, *_Backward(stack, ctx.plan, buffers, grads, needs).run()


def _load(ctx: Any, count: int) -> tuple[Stack, list[_Buffers]]:
    """The stack and the buffers that the forward pass saved; ``count``: of the arguments."""
    keep, *saved = ctx.saved_tensors
    arguments = [ctx.numbers.get(at, value) for at, value in enumerate(saved[:count])]
    stack = ctx.stack._replace(keep=keep).of(*arguments)
    layers = len(stack.layers)
    kept, rest = saved[count : count + layers], saved[count + layers :]
    buffers: list[_Buffers] = []
    for number in range(layers):
        inputs = kept[number]
        if inputs is None:
            inputs = buffers[-1].hiddens[1:] if number else stack.inputs
        buffers.append(_Buffers(inputs, *rest[3 * number : 3 * number + 3]))
    return stack, buffers


def _by_reference(stack: Stack, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """As :meth:`_Backward.run`, by the reference: the gradients may be differentiated again."""

    def run(*arguments: Any) -> list[Tensor]:
        return in_order(stack.of(*arguments), recurrence_by_reference)

    return gradients_through(run, stack.arguments(), grads, needs)


# Function.apply looks for torch.func's transforms and tensors first. Such a call does not come here.
_apply = super(torch.autograd.Function, _Recurrence).apply
