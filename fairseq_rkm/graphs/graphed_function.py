"""A function of tensors whose forward and backward pass are CUDA graphs, a pair for each shape of its inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, Run, copy_all, record

Shapes = tuple[torch.Size, ...]
MOST_SHAPES = 1000
"""Pairs of graphs that are kept; shapes beyond them are done without."""


class _Passes(NamedTuple):
    """The recorded passes of one shape, and the tensors at which they find inputs and leave and find the rest."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    grad_outputs: list[Tensor]
    forward: Run
    backward: Run
    moved: list[int]


class GraphedFunction:
    """Replay a function in training: what it launches costs the host one launch forward and one backward.

    A shape is met once without graphs and recorded when it is met again
    (:class:`~fairseq_rkm.graphs.recording.Recordings`). All graphs share their memory: what a forward
    pass keeps for its backward pass is there until the next forward pass.

    Args:
        function: of tensors that need no gradients, to a tuple of tensors; it must wait for nothing of the GPU's.
        weights: all that gradients are to go to.
        record: :func:`~fairseq_rkm.graphs.recording.record`.
        remedy: ends the sentence of an error: how to do without graphs.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        weights: Sequence[Tensor],
        record: Callable = record,
        remedy: str = "do without CUDA graphs",
    ) -> None:
        self.function, self.weights, self.remedy = function, list(weights), remedy
        self.gradients = [torch.empty_like(weight) for weight in self.weights]
        self.recorder = GraphRecorder(self.weights[0].device, record, remedy)
        self.recorded: Recordings[Shapes, _Passes] = Recordings(MOST_SHAPES)
        self.forward_passes = 0

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function returns; ``inputs`` must be of one type each time, and of any shapes.

        Raises:
            RKMError: a function that cannot be recorded.
        """
        shapes = tuple(x.shape for x in inputs)
        with self.recorder.own_stream():
            passes = self.recorded.find(shapes, lambda: self._record(inputs))
            if passes is None:
                return self.function(*inputs)
            outputs: tuple[Tensor, ...] = _Replay.apply(self, passes, *inputs, *self.weights)
            return outputs

    def _record(self, inputs: Sequence[Tensor]) -> _Passes:
        held = [x.clone() for x in inputs]
        alive: list[Tensor] = []  # from the forward to the backward pass, and with them all that the latter needs
        outputs: list[Tensor] = []
        moved: list[int] = []

        def forward() -> None:
            with torch.enable_grad():
                alive[:] = self.function(*held)
            if not outputs:
                outputs.extend(torch.empty_like(x) for x in alive)
            copy_all(outputs, [x.detach() for x in alive])

        def backward() -> None:
            grads = torch.autograd.grad(alive, self.weights, grad_outputs, allow_unused=True)
            alive.clear()
            moved[:] = [i for i, grad in enumerate(grads) if grad is not None]
            copy_all([self.gradients[i] for i in moved], [grads[i] for i in moved])

        replay_forward = self.recorder.record(forward)
        grad_outputs = [torch.empty_like(x) for x in outputs]
        return _Passes(held, outputs, grad_outputs, replay_forward, self.recorder.record(backward), moved)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, owner: GraphedFunction, passes: _Passes, *tensors: Tensor) -> tuple[Tensor, ...]:
        copy_all(passes.inputs, tensors[: len(passes.inputs)])
        passes.forward()
        owner.forward_passes += 1
        ctx.owner, ctx.passes, ctx.number = owner, passes, owner.forward_passes
        return tuple(x.detach() for x in passes.outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        owner, passes = ctx.owner, ctx.passes
        if torch.is_grad_enabled():
            raise RKMError(
                f"gradients that are recorded have no derivatives of their own (create_graph): {owner.remedy}"
            )
        if ctx.number != owner.forward_passes:
            raise RKMError(
                "two forward passes before the first one's backward pass, which shares its memory with the second: "
                f"{owner.remedy}"
            )
        copy_all(passes.grad_outputs, grad_outputs)
        passes.backward()
        moved = set(passes.moved)
        grads = [grad if i in moved else None for i, grad in enumerate(owner.gradients)]
        return (None, None, *[None] * len(passes.inputs), *grads)
