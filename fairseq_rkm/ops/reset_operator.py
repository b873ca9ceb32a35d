"""A recurrence with resets as an operator that PyTorch knows, ``fairseq_rkm::anew``.

Its kernel reads the mask when the program runs, so that a compiled program holds for any mask and any backend. Its
backward pass runs the recurrence once more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import operators
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.higher_derivatives import without_autocast
from fairseq_rkm.ops.passes import Extent, Saved
from fairseq_rkm.ops.segments import Fresh, Reset
from fairseq_rkm.ops.weights import Weights

ARGUMENTS = f"str backend, {operators.ARGUMENTS}, Tensor reset, Tensor? fresh_hidden, Tensor? fresh_memory, int ahead"


class ResetOperator:
    """The operator and its backward pass.

    Args:
        recurrence: computes it, as :func:`fairseq_rkm.ops.anew.recurrence`.
    """

    def __init__(self, recurrence: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self.recurrence = recurrence
        self._forward = operators.define("anew", f"({ARGUMENTS}) -> (Tensor, Tensor, Tensor)", "default", self._run)
        grads = "Tensor? grad_output, Tensor? grad_hidden, Tensor? grad_memory, bool[] needs"
        self._backward = operators.define(
            "anew_backward", f"({ARGUMENTS}, {grads}) -> Tensor[]", "default", self._run_backward
        )
        torch.library.register_fake("fairseq_rkm::anew", self._fake)
        torch.library.register_fake("fairseq_rkm::anew_backward", self._fake_backward)
        torch.library.register_autograd("fairseq_rkm::anew", self._gradients, setup_context=self._save)
        torch.library.register_autograd("fairseq_rkm::anew_backward", self._no_second_derivatives)

    def __call__(
        self, backend: str, cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None,
        keep: Tensor | None, mask: Tensor, fresh: Fresh, ahead: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As :func:`fairseq_rkm.ops.anew.recurrence`."""
        problem = operators.arguments(cell, inputs, weights, hidden, memory, keep)
        results: tuple[Tensor, Tensor, Tensor] = self._forward(backend, *problem, mask, *fresh, ahead)
        return results

    def _run(self, *given: Any) -> tuple[Tensor, ...]:
        return tuple(operators.fresh(self._results(given), given))

    def _results(self, given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        backend, *arguments, mask, fresh_hidden, fresh_memory, ahead = given
        problem = operators.read(*arguments)
        cell, keep, inputs, hidden, memory, weights, _ = problem
        with without_autocast(inputs.device.type):
            return self.recurrence(
                cell, inputs, weights, weights.input.size(0) // len(cell.gates), hidden, memory, keep, backend,
                Reset(mask), (fresh_hidden, fresh_memory), ahead,
            )  # fmt: skip

    def _fake(self, *given: Any) -> tuple[Tensor, ...]:
        problem: Saved = operators.read(*given[1:-4])
        extent, inputs = Extent.of(problem.cell, problem.inputs, problem.weights), problem.inputs
        row = extent.batch, extent.size
        output = inputs.new_empty(extent.steps, *row)
        return output, inputs.new_empty(row), inputs.new_empty(row, dtype=extent.wide)

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))

    def _gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = [other if t is None else t for other, t in zip(ctx.others, ctx.saved_tensors, strict=True)]
        needs = list(ctx.needs_input_grad)
        if not any(grad is not None for grad in grads):
            return (None,) * len(needs)
        found = iter(self._backward(*given, *grads, needs))
        return tuple(next(found) if need else None for need in needs)

    def _run_backward(self, *given: Any) -> list[Tensor]:
        *arguments, grad_output, grad_hidden, grad_memory, needs = given
        # PyTorch calls an operator's kernel with autograd switched off for good; here it is wanted.
        autograd = torch._C.DispatchKey.AutogradFunctionality
        with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
            leaves = [v.detach().requires_grad_() if n else v for v, n in zip(arguments, needs, strict=True)]
            both = zip(self._results(leaves), (grad_output, grad_hidden, grad_memory), strict=True)
            pairs = [(result, grad) for result, grad in both if grad is not None and result.requires_grad]
            wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found = torch.autograd.grad(
                [result for result, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
        return operators.fresh(found, [*arguments, grad_output, grad_hidden, grad_memory])

    def _fake_backward(self, *given: Any) -> list[Tensor]:
        *arguments, _output, _hidden, _memory, needs = given
        return [v.new_empty(v.shape) for v, need in zip(arguments, needs, strict=True) if need]

    def _no_second_derivatives(self, *_: Any) -> None:
        raise RKMError(
            "the program that was recorded here holds the numbers of fairseq_rkm::anew's gradients, which cannot be "
            "differentiated again. Record it with create_graph=True, or with backend='reference'"
        )
