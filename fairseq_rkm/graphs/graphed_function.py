"""A function of tensors with CUDA graphs for its forward and backward pass, a pair for each shape of its inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.graphs.recording import GraphRecorder, Recordings, Run, copy_all, record

Shapes = tuple[torch.Size, ...]
MOST_SHAPES = 1000
"""The number of pairs kept; further shapes run without graphs."""


class _Passes(NamedTuple):
    """The recorded passes of one shape, and the tensors that they read and write."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    grad_outputs: list[Tensor]
    forward: Run
    backward: Run
    moved: list[int]


class GraphedFunction:
    """Replay a function in training: it costs the host one launch forward and one backward.

    A shape first runs without graphs and is recorded when met again
    (:class:`~fairseq_rkm.graphs.recording.Recordings`). All graphs share their memory: a backward pass must come before
    the next forward pass.

    Args:
        function: takes tensors that need no gradients, and returns a tuple of tensors. It must not wait for the GPU.
        weights: all tensors that receive gradients.
        record: :func:`~fairseq_rkm.graphs.recording.record`, or a stand-in for tests.
        remedy: the end of an error's sentence; it says how to do without graphs.

    Example:
        >>> layer = nn.Linear(8, 4, device="cuda")
        >>> graphed = GraphedFunction(lambda x: (layer(x).square().sum(),), list(layer.parameters()))
        >>> for x in batches:
        ...     (loss,) = graphed(x)
        ...     loss.backward()  # into layer.weight.grad and layer.bias.grad
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
        """The function's outputs.

        Args:
            inputs: tensors of any shapes, and of the same dtypes at each call.

        Raises:
            RKMError: the function cannot be recorded.
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
        alive: list[Tensor] = []  # the outputs keep alive all that the backward pass needs
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
