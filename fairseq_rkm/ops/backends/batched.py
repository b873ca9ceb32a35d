"""Plain PyTorch with a hand-written backward pass: work independent of ``h_{t-1}`` is done for all steps at once.

Forward, one matrix product projects the inputs of all steps. A step is one product with ``U``, one sigmoid over the
stacked gates and a few fused multiply-adds into preallocated buffers. Backward, each gate's gradient is a factor times
the gradient of ``c_t``, or of ``h_t`` for the output gate. The factors of all steps are known in advance: a step is one
product with ``U`` and four pointwise operations. One product at the end gives each weight's gradient.

Without feedback a block is the whole sequence. Only the memory's own recurrence stays in the loop, and a cell without
memory has no loop.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_rkm.ops.cells import CANDIDATE, FORGET, INPUT, OUTPUT, Cell
from fairseq_rkm.ops.gate_layout import gate_slices, recurrent_slice
from fairseq_rkm.ops.gradients import parameter_gradients
from fairseq_rkm.ops.kernel_candidates import (
    CandidateSlopes,
    Filters,
    candidate,
    filters_of,
    product_bias,
    sees_hidden,
    squared,
    squared_windows,
)
from fairseq_rkm.ops.ngram import last_real_step, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.weights import LAYER_NORM_EPS, Weights, memory_dtype


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    bias = weights.bias if cell.kernel.is_linear else product_bias(cell, weights)
    gates = project(inputs, weights.input, bias).to(memory_dtype(inputs.dtype))
    run = _Forward(cell, weights, gates, inputs.dtype, keep)
    if not cell.kernel.is_linear:
        run.take_kernel(inputs)
    run.start(hidden, memory)
    run.loop()
    norm = run.norm or (None, None, None)
    return Results(*run.results(), (gates, run.hidden, run.memory, *norm))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, weights, (gates, hidden, memory, raw, mean, rstd) = saved.cell, saved.weights, saved.own
    norm = None if raw is None else _Norm(raw, mean, rstd)
    slopes = None if cell.kernel.is_linear else CandidateSlopes(cell, weights, saved.inputs, hidden[:-1])
    run = _Backward(cell, weights, gates, hidden, memory, saved.keep, norm, slopes)
    likes = hidden[1:], hidden[0], memory[0]
    given = [torch.zeros_like(like) if grad is None else grad for grad, like in zip(grads, likes, strict=True)]
    grad_hidden, grad_memory = run.loop(*given)
    known, wanted = run.norm_gradients(), (needs[0], *needs[3:])
    if slopes is None:
        grad_inputs, *rest = parameter_gradients(
            cell, weights, saved.inputs, hidden, memory, gates, run.factors, known, wanted
        )
    else:
        grad_inputs, *rest = slopes.parameter_gradients(
            hidden, memory, gates, run.factors, run.to_candidate, known, wanted
        )
    return grad_inputs, grad_hidden if needs[1] else None, grad_memory if needs[2] else None, *rest


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The gates, all h, all c, and the layer norm's :class:`_Norm`."""
    steps, batch, size, gates, narrow, wide, norm = extent
    statistic = ((steps, batch, 1), wide) if norm else None
    return (
        ((steps, batch, gates), wide), ((steps + 1, batch, size), narrow), ((steps + 1, batch, size), wide),
        ((steps, batch, size), wide) if norm else None, statistic, statistic,
    )  # fmt: skip


PASSES = Passes(forward, backward, own)


class _Norm(NamedTuple):
    """The layer norm's input ``c_t``, ``(T, B, d)``, and its statistics, ``(T, B, 1)``, for the backward pass."""

    raw: Tensor
    mean: Tensor
    rstd: Tensor


def _blocks(steps: int, feedback: bool) -> Iterator[slice]:
    """Stretches of time without dependence on the output: single steps with feedback, else the whole."""
    if feedback:
        return (slice(t, t + 1) for t in range(steps))
    return iter([slice(0, steps)] if steps else [])


class _Forward:
    """Buffers and loop of the forward pass.

    ``hidden`` and ``memory`` are ``(T + 1, B, d)``: entry t + 1 holds step t's, entry 0 the initial state.
    """

    def __init__(self, cell: Cell, weights: Weights, gates: Tensor, dtype: torch.dtype, keep: Tensor | None) -> None:
        steps, batch, size = gates.size(0), gates.size(1), gates.size(2) // len(cell.gates)
        self.cell, self.weights, self.gates = cell, weights, gates
        self.at = gate_slices(cell, size)
        self.hidden = gates.new_empty(steps + 1, batch, size, dtype=dtype)
        self.memory = gates.new_empty(steps + 1, batch, size)
        self.keep = None if keep is None else keep.unsqueeze(-1)
        self.norm = None
        if weights.norm_weight is not None:
            statistics = (gates.new_empty(steps, batch, 1) for _ in range(2))
            self.norm = _Norm(torch.empty_like(self.memory[1:]), *statistics)
        self.kernel: tuple[Filters, Tensor] | None = None

    def take_kernel(self, inputs: Tensor) -> None:
        """Take candidates through the cell's kernel: the gates hold ``w^T z`` in their place."""
        self.kernel = filters_of(self.cell, self.weights), squared_windows(inputs, self._ngram(inputs))

    def _through(self, kernel: tuple[Filters, Tensor], block: slice) -> Tensor:
        """A block's candidates through the cell's kernel."""
        filters, windows = kernel
        squares = windows[block]
        if sees_hidden(self.cell):
            squares = squares + squared(self.hidden[block])
        return candidate(self.cell, self.gates[block][..., : self.hidden.size(2)], filters, squares)

    def _ngram(self, inputs: Tensor) -> int:
        return self.weights.input.size(1) // inputs.size(2)

    def start(self, hidden: Tensor | None, memory: Tensor | None) -> None:
        """Begin with this state; None stands for zeros."""
        for states, first in ((self.hidden, hidden), (self.memory, memory)):
            _ = states[0].zero_() if first is None else states[0].copy_(first)

    def loop(self) -> None:
        recurrent = None if self.weights.recurrent is None else self.weights.recurrent.t()
        for block in _blocks(self.gates.size(0), recurrent is not None):
            if recurrent is not None:
                self._feed_back(block.start, recurrent)
            self._activate(block)
            self._remember(block)
            self._emit(block)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        output, hidden, memory = self.hidden[1:], self.hidden[-1], self.memory[-1]
        if self.keep is not None:
            if self.weights.recurrent is None:
                last = last_real_step(self.keep.squeeze(-1)).view(1, -1, 1).expand(1, *hidden.shape)
                hidden, memory = self.hidden.gather(0, last)[0], self.memory.gather(0, last)[0]
            output = output.masked_fill(~self.keep, 0)
        return output, hidden.clone(), memory.clone()

    def _feed_back(self, t: int, recurrent: Tensor) -> None:
        gates = self.gates[t, :, recurrent_slice(self.cell, self.hidden.size(2))]
        if gates.dtype == recurrent.dtype:
            gates.addmm_(self.hidden[t], recurrent)
        else:
            gates.add_(self.hidden[t] @ recurrent)

    def _activate(self, block: slice) -> None:
        size = self.hidden.size(2)
        gates = self.gates[block]
        if self.kernel is not None:
            gates[..., :size] = self._through(self.kernel, block)
        if self.cell.squash_candidate:
            gates[..., :size].tanh_()
        if len(self.cell.gates) > 1:
            gates[..., size:].sigmoid_()

    def _remember(self, block: slice) -> None:
        """``c_t`` of a block's steps, step by step for a cell with memory."""
        if not self.cell.has_memory:
            self._combine(block, block)
            return
        for t in range(block.start, block.stop):
            self._combine(slice(t, t + 1), slice(t, t + 1))

    def _combine(self, now: slice, before: slice) -> None:
        cell, weights, gates, previous = self.cell, self.weights, self.gates[now], self.memory[before]
        kept = self.memory[now.start + 1 : now.stop + 1]
        new = kept if self.norm is None else self.norm.raw[now]
        remembered(cell, weights, gates, previous, new)
        if cell.clip is not None:
            new.clamp_(-cell.clip, cell.clip)
        if self.norm is not None:
            kept[...], self.norm.mean[now], self.norm.rstd[now] = torch.native_layer_norm(
                new, new.shape[-1:], weights.norm_weight, weights.norm_bias, LAYER_NORM_EPS
            )
        if self.keep is not None and cell.has_memory:
            kept.copy_(torch.where(self.keep[now], kept, previous))

    def _emit(self, block: slice) -> None:
        output = self.memory[block.start + 1 : block.stop + 1]
        if self.cell.squash_output:
            output = output.tanh()
        if self.cell.output_is_gate:
            output = output * self.gates[block][..., self.at[OUTPUT]]
        if self.keep is not None and self.weights.recurrent is not None:
            output = torch.where(self.keep[block], output, self.hidden[block].to(output.dtype))
        self.hidden[block.start + 1 : block.stop + 1] = output


def remembered(cell: Cell, weights: Weights, gates: Tensor, previous: Tensor, out: Tensor) -> None:
    """``c_t`` before layer norm or clipping, from the activated gates and ``c_{t-1}``."""
    at = gate_slices(cell, out.size(-1))
    candidate = gates[..., at[CANDIDATE]]
    if cell.input_is_complement:
        torch.lerp(candidate, previous, gates[..., at[FORGET]], out=out)
        return
    torch.mul(candidate, gates[..., at[INPUT]] if cell.input_is_gate else weights.sigma_i, out=out)
    if cell.forget_is_gate:
        out.addcmul_(gates[..., at[FORGET]], previous)
    elif cell.has_memory:
        out.add_(previous * weights.sigma_f)


class _Backward:
    """Factors, loop and parameter gradients of the backward pass, from the forward pass's buffers."""

    def __init__(
        self, cell: Cell, weights: Weights, gates: Tensor, hidden: Tensor, memory: Tensor, keep: Tensor | None,
        norm: _Norm | None, slopes: CandidateSlopes | None = None,
    ) -> None:  # fmt: skip
        self.cell, self.weights, self.gates, self.hidden, self.memory = cell, weights, gates, hidden, memory
        self.norm, self.slopes = norm, slopes
        self.padding = None if keep is None else ~keep.unsqueeze(-1)
        self.at = gate_slices(cell, hidden.size(2))
        self.normed_grad = torch.empty_like(memory[1:] if norm is not None else memory[:0])
        self.inside = None if cell.clip is None else self._inside(cell.clip)
        self._factors()

    def _inside(self, clip: float) -> Tensor:
        """1 where ``c_t`` was within the bound, or at it, before clipping; else 0, as for ``torch.clamp``."""
        raw = torch.empty_like(self.memory[1:])
        remembered(self.cell, self.weights, self.gates, self.memory[:-1], raw)
        return (raw.abs() <= clip).to(raw.dtype)

    def _factors(self) -> None:
        """``factors``: d c_t / d a^g_t before the layer norm, or d h_t / d a^output_t; ``slope``: d h_t / d c_t.

        Through a kernel other than the linear one ``factors`` are with respect to the candidate's ``w^T z``, and
        ``to_candidate`` to what the kernel gives.
        """
        cell, at, gates, memory = self.cell, self.at, self.gates, self.memory[1:]
        factors = torch.empty_like(gates)
        candidate = gates[..., at[CANDIDATE]]
        into = factors[..., at[CANDIDATE]]
        if cell.input_is_complement:
            torch.sub(1, gates[..., at[FORGET]], out=into)
        elif cell.input_is_gate:
            into.copy_(gates[..., at[INPUT]])
            factors[..., at[INPUT]] = candidate * _sigmoid_slope(gates[..., at[INPUT]])
        else:
            torch.mul(torch.ones_like(into), self.weights.sigma_i, out=into)
        if cell.squash_candidate:
            into.mul_(_tanh_slope(candidate))
        self.to_candidate = into[:0] if self.slopes is None else into.clone()
        if self.slopes is not None:
            into.mul_(self.slopes.dot)
        if cell.forget_is_gate:
            reach = self.memory[:-1] - candidate if cell.input_is_complement else self.memory[:-1]
            factors[..., at[FORGET]] = reach * _sigmoid_slope(gates[..., at[FORGET]])
        squashed = memory.tanh() if cell.squash_output else memory
        slope = _tanh_slope(squashed) if cell.squash_output else torch.ones_like(memory)
        if cell.output_is_gate:
            gate = gates[..., at[OUTPUT]]
            factors[..., at[OUTPUT]] = squashed * _sigmoid_slope(gate)
            slope.mul_(gate)
        if self.padding is not None:
            # Filled, not multiplied: zero times NaN is NaN, and padding has no part in a gradient.
            factors.masked_fill_(self.padding, 0)
            if self.slopes is not None:
                self.to_candidate.masked_fill_(self.padding, 0)
            slope.masked_fill_(self.padding, 0)
        self.factors, self.slope = factors, slope

    def loop(self, grad_output: Tensor, grad_hidden: Tensor, grad_memory: Tensor) -> tuple[Tensor, Tensor]:
        """Turn ``factors`` into the gates' gradients, and return the initial state's."""
        weights, dtype = self.weights, self.memory.dtype
        grad_output = grad_output.to(dtype)
        if self.padding is not None:
            grad_output = grad_output.masked_fill(self.padding, 0)
        if weights.recurrent is None:
            return self._parallel(grad_output, grad_hidden.to(dtype), grad_memory)
        recurrent = recurrent_slice(self.cell, self.hidden.size(2))
        grad_hidden = grad_hidden.to(dtype)
        for t in range(self.gates.size(0) - 1, -1, -1):
            through = grad_hidden
            grad_hidden = grad_hidden + grad_output[t]
            if self.padding is not None:
                grad_hidden = grad_hidden.masked_fill(self.padding[t], 0)
            self._through_output(slice(t, t + 1), grad_hidden)
            grad_memory = self._through_memory(t, torch.addcmul(grad_memory, grad_hidden, self.slope[t]))
            fed_back = self.factors[t, :, recurrent]
            grad_hidden = (fed_back.to(weights.recurrent.dtype) @ weights.recurrent).to(dtype)
            if self.slopes is not None and self.slopes.windows is not None and sees_hidden(self.cell):
                to_squares = self.slopes.through_windows(self.to_candidate[t] * self.slopes.windows[t])
                grad_hidden.addcmul_(self.hidden[t].to(dtype), to_squares, value=2)
            if self.padding is not None:
                grad_hidden = torch.where(self.padding[t], through, grad_hidden)
        return grad_hidden.to(self.hidden.dtype), grad_memory

    def _parallel(self, grad_output: Tensor, grad_hidden: Tensor, grad_memory: Tensor) -> tuple[Tensor, Tensor]:
        """The loop without feedback: only the memory's recurrence, if there is one, goes step by step."""
        steps = self.gates.size(0)
        grads = torch.cat([torch.zeros_like(grad_hidden).unsqueeze(0), grad_output])
        held = torch.zeros_like(grads)
        last = grads.new_full((grads.size(1),), steps, dtype=torch.int64)
        if self.padding is not None:
            last = last_real_step(~self.padding.squeeze(-1))
        index = last.view(1, -1, 1).expand(1, *grad_hidden.shape)
        grads.scatter_add_(0, index, grad_hidden.unsqueeze(0))
        held.scatter_add_(0, index, grad_memory.unsqueeze(0))
        self._through_output(slice(0, steps), grads[1:])
        into_memory = torch.addcmul(held[1:], grads[1:], self.slope)
        if not self.cell.has_memory:
            self._through_norm(slice(0, steps), into_memory)
            return grads[0].to(self.hidden.dtype), held[0]
        carried = torch.zeros_like(grad_memory)
        for t in range(steps - 1, -1, -1):
            carried = self._through_memory(t, carried + into_memory[t])
        return grads[0].to(self.hidden.dtype), carried + held[0]

    def _through_output(self, block: slice, grad_hidden: Tensor) -> None:
        if self.cell.output_is_gate:
            self.factors[block][..., self.at[OUTPUT]] *= grad_hidden

    def _through_norm(self, block: slice, grad: Tensor) -> Tensor:
        """From the gradient of ``c_t`` compute the memory gates'; return the one before layer norm or clipping."""
        if self.padding is not None:
            grad = grad.masked_fill(self.padding[block], 0)
        if self.inside is not None:
            grad = grad * self.inside[block]
        if self.norm is not None:
            self.normed_grad[block] = grad
            grad = torch.ops.aten.native_layer_norm_backward(
                grad, self.norm.raw[block], grad.shape[-1:], self.norm.mean[block], self.norm.rstd[block],
                self.weights.norm_weight, self.weights.norm_bias, [True, False, False],
            )[0]  # fmt: skip
        size = self.hidden.size(2)
        count = len(self.cell.gates) - self.cell.output_is_gate
        gates = self.factors[block][..., : count * size].unflatten(-1, (count, size))
        gates *= grad.unsqueeze(-2)
        if self.slopes is not None:
            self.to_candidate[block] *= grad
        return grad

    def _through_memory(self, t: int, grad: Tensor) -> Tensor:
        """The gradient of ``c_{t-1}`` from the gradient of ``c_t``."""
        before = self._through_norm(slice(t, t + 1), grad.unsqueeze(0)).squeeze(0)
        forget = self.gates[t, :, self.at[FORGET]] if self.cell.forget_is_gate else self.weights.sigma_f
        if self.padding is None:
            return before * forget
        return torch.where(self.padding[t], grad, before * forget)

    def norm_gradients(self) -> dict[str, Tensor]:
        """The gradients of the layer norm's gain and bias; empty without a layer norm."""
        if self.norm is None:
            return {}
        gain, shift = torch.ops.aten.native_layer_norm_backward(
            self.normed_grad, self.norm.raw, (self.hidden.size(2),), self.norm.mean, self.norm.rstd,
            self.weights.norm_weight, self.weights.norm_bias, [False, True, True],
        )[1:]  # fmt: skip
        return {"norm_weight": gain, "norm_bias": shift}


def _sigmoid_slope(value: Tensor) -> Tensor:
    return value - value * value


def _tanh_slope(value: Tensor) -> Tensor:
    return 1 - value * value
