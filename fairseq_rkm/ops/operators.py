"""The backends as operators that PyTorch knows: ``fairseq_rkm::native``, ``::batched``, ``::scan`` and so on.

Each has a fake kernel and a backward pass, which is an operator too (``fairseq_rkm::native_backward``).
``torch.compile``, ``make_fx``, FakeTensorMode, meta tensors and selective checkpoints see one operator in place of a
loop. Eager calls go by :mod:`fairseq_rkm.ops.eager`, which costs less.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops.cells import Cell, cell_of_key
from fairseq_rkm.ops.flop_counts import backward_flops, forward_flops, teach_counters
from fairseq_rkm.ops.higher_derivatives import differentiate, load, save, without_autocast
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Saved
from fairseq_rkm.ops.problem_checks import check, laid_out
from fairseq_rkm.ops.weights import Weights

_TENSORS = ", ".join(f"Tensor{'' if name == 'input' else '?'} {name}" for name in Weights._fields)
ARGUMENTS = f"str cell, Tensor inputs, Tensor? hidden, Tensor? memory, Tensor? keep, {_TENSORS}, float s_i, float s_f"
"""The arguments of an operator. ``cell`` is :attr:`Cell.key`; ``s_i`` and ``s_f`` are the scales without a tensor."""
UNSEEN = Extent(1, 1, 1, 1, torch.float32, torch.float32, norm=False)


def arguments(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> tuple[Any, ...]:
    """A recurrence's arguments, as an operator takes them."""
    # Numbers that are not read are left out: to torch.compile each is a variable.
    s_i = weights.sigma_i if cell.input_is_constant and not isinstance(weights.sigma_i, Tensor) else 0.0
    s_f = weights.sigma_f if cell.forget_is_constant and not isinstance(weights.sigma_f, Tensor) else 0.0
    return cell.key, inputs, hidden, memory, keep, *weights.tensors(), s_i, s_f


def read(key: str, inputs: Tensor, hidden: Any, memory: Any, keep: Any, *rest: Any) -> Saved:
    """Undo :func:`arguments`."""
    *tensors, s_i, s_f = rest
    weights = Weights(*tensors)
    weights = weights._replace(
        sigma_i=s_i if weights.sigma_i is None else weights.sigma_i,
        sigma_f=s_f if weights.sigma_f is None else weights.sigma_f,
    )
    return Saved(cell_of_key(key), keep, inputs, hidden, memory, weights, ())


def define(name: str, schema: str, key: str, kernel: Callable[..., Any]) -> Any:
    """Define an operator of this package with a kernel for a dispatch key; ``"default"`` is any device."""
    torch.library.define(f"fairseq_rkm::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fairseq_rkm::{name}", key, kernel)
    return getattr(torch.ops.fairseq_rkm, name).default


def fresh(results: Sequence[Tensor], given: Iterable[Any]) -> list[Tensor]:
    """Results that are contiguous and share no memory with each other or with arguments, as PyTorch demands."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, Tensor)}
    own = []
    for tensor in results:
        whole = tensor.contiguous()
        if whole.storage_offset() or whole.untyped_storage().data_ptr() in taken:
            whole = whole.clone()
        taken.add(whole.untyped_storage().data_ptr())
        own.append(whole)
    return own


def _differentiable(problem: Saved, needs: Sequence[bool]) -> list[Tensor]:
    """The tensors whose gradients are wanted."""
    every: tuple[Any, ...] = (problem.inputs, problem.hidden, problem.memory, *problem.weights)
    return [tensor for tensor, need in zip(every, needs, strict=True) if need]


class Operator:
    """A backend's forward and backward pass as operators.

    Args:
        name: the backend's name.
        passes: its passes.
        refuses: why a problem is beyond it, or None; asked anew whenever a compiled program runs.
    """

    def __init__(self, name: str, passes: Passes, refuses: Callable[..., str | None]) -> None:
        self.name, self.passes, self.refuses = name, passes, refuses
        results = ", ".join(["Tensor"] * (3 + len(passes.own(UNSEEN))))
        grads = "Tensor[] own, Tensor? grad_output, Tensor? grad_hidden, Tensor? grad_memory, bool[] needs"
        self._forward = define(name, f"({ARGUMENTS}) -> ({results})", "default", self._run)
        self._backward = define(
            f"{name}_backward", f"({ARGUMENTS}, {grads}) -> Tensor[]", "default", self._run_backward
        )
        for full_name, fake, backward, setup_context in (
            (f"fairseq_rkm::{name}", self._fake, self._gradients, self._save),
            (f"fairseq_rkm::{name}_backward", self._fake_backward, self._no_second_derivatives, None),
        ):
            torch.library.register_fake(full_name, fake)
            torch.library.register_autograd(full_name, backward, setup_context=setup_context)

    def forward(self, *problem: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As :func:`fairseq_rkm.ops.reference.recurrence`."""
        teach_counters(self._forward, lambda *given, **_result: forward_flops(read(*given)))
        output, hidden, memory, *_ = self._forward(*arguments(*problem))
        return output, hidden, memory

    def backward(self, saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
        """As :attr:`Passes.backward`."""
        teach_counters(self._backward, lambda *given, **_result: backward_flops(read(*given[:-5]), given[-1]))
        given = arguments(saved.cell, saved.inputs, saved.weights, saved.hidden, saved.memory, saved.keep)
        own = [saved.inputs.new_empty(0) if tensor is None else tensor for tensor in saved.own]
        found = iter(self._backward(*given, own, *grads, list(needs)))
        return tuple(next(found) if need else None for need in needs)

    def _run(self, *given: Any) -> tuple[Tensor, ...]:
        problem = self._checked(given)
        cell, keep, inputs, hidden, memory, weights, _ = problem
        inputs, weights, hidden, memory = laid_out(inputs, weights, hidden, memory)
        with without_autocast(inputs.device.type):
            output, last_hidden, last_memory, own = self.passes.forward(cell, inputs, weights, hidden, memory, keep)
        results = [output, last_hidden, last_memory, *(inputs.new_empty(0) if t is None else t for t in own)]
        return tuple(fresh(results, given))

    def _fake(self, *given: Any) -> tuple[Tensor, ...]:
        problem = read(*given)
        extent, inputs = Extent.of(problem.cell, problem.inputs, problem.weights), problem.inputs
        row = extent.batch, extent.size
        sketches = ((extent.steps, *row), extent.narrow), (row, extent.narrow), (row, extent.wide)
        own = [sketch or ((0,), extent.narrow) for sketch in self.passes.own(extent)]
        return tuple(inputs.new_empty(shape, dtype=dtype) for shape, dtype in (*sketches, *own))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem = read(*inputs)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        save(ctx, problem._replace(own=self._own(problem, output[3:])))

    def _own(self, problem: Saved, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The forward pass's own tensors, with None in its places."""
        sketches = self.passes.own(Extent.of(problem.cell, problem.inputs, problem.weights))
        return [None if sketch is None else tensor for sketch, tensor in zip(sketches, tensors, strict=True)]

    def _gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        needs = (*needs[1:4], *needs[5 : 5 + len(Weights._fields)])
        inputs, hidden, memory, *weights = differentiate(self.passes, self.backward, load(ctx), grads[:3], needs)
        return None, inputs, hidden, memory, None, *weights, None, None

    def _run_backward(self, *given: Any) -> list[Tensor]:
        *arguments, own, grad_output, grad_hidden, grad_memory, needs = given
        problem = self._checked(arguments)
        own = self._own(problem, own)
        self._check_own(problem, own)
        inputs, weights, hidden, memory = laid_out(problem.inputs, problem.weights, problem.hidden, problem.memory)
        whole = Saved(problem.cell, problem.keep, inputs, hidden, memory, weights, own)
        with without_autocast(inputs.device.type):
            found = self.passes.backward(whole, (grad_output, grad_hidden, grad_memory), needs)
        wanted = [grad for grad, need in zip(found, needs, strict=True) if need]
        results = [
            like.new_zeros(like.shape) if grad is None else grad.to(like.dtype)
            for like, grad in zip(_differentiable(problem, needs), wanted, strict=True)
        ]
        return fresh(results, [*arguments, *own, grad_output, grad_hidden, grad_memory])

    def _fake_backward(self, *given: Any) -> list[Tensor]:
        *arguments, _own, _output, _hidden, _memory, needs = given
        return [like.new_empty(like.shape) for like in _differentiable(read(*arguments), needs)]

    def _no_second_derivatives(self, *_: Any) -> None:
        raise RKMError(
            f"the program that was recorded here holds the numbers of fairseq_rkm::{self.name}'s gradients, which "
            "cannot be differentiated again. Record it with create_graph=True, or with backend='reference'"
        )

    def _checked(self, given: Sequence[Any]) -> Saved:
        problem = read(*given)
        cell, inputs, weights = problem.cell, problem.inputs, problem.weights
        size = weights.input.size(0) // len(cell.gates)
        check(cell, inputs, weights, size, problem.hidden, problem.memory, problem.keep)
        reason = self.refuses(cell, inputs, weights)
        if reason is not None:
            raise RKMError(f"backend {self.name!r} cannot run this: {reason}")
        return problem

    def _check_own(self, problem: Saved, own: Sequence[Tensor | None]) -> None:
        sketches = self.passes.own(Extent.of(problem.cell, problem.inputs, problem.weights))
        for sketch, tensor in zip(sketches, own, strict=True):
            if tensor is not None and (tuple(tensor.shape), tensor.dtype) != sketch:
                raise RKMError(f"a result of fairseq_rkm::{self.name} must be {sketch} here, not {tuple(tensor.shape)}")
