"""On GPUs, with feedback: one launch for a whole sequence, the recurrent weights on the chip (``persistent.cu``).

Projections of the inputs and gradients of the weights do not depend on ``h_{t-1}``. Each is one matrix product over all
steps, as in :mod:`fairseq_rkm.ops.backends.batched`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_rkm.ops.alignment import clear_and_align
from fairseq_rkm.ops.backends.persistent.launch import Gradients as KernelGradients
from fairseq_rkm.ops.backends.persistent.launch import PassLaunch
from fairseq_rkm.ops.backends.persistent.plan import Problem, plan_for
from fairseq_rkm.ops.batch_rounding import likely, round_up
from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.compilation import nvrtc
from fairseq_rkm.ops.gradients import parameter_gradients, product_operands
from fairseq_rkm.ops.ngram import is_empty, project
from fairseq_rkm.ops.passes import Extent, Gradients, Passes, Results, Saved, Sketch
from fairseq_rkm.ops.weights import Weights


def refuses(cell: Cell, inputs: Tensor, weights: Weights) -> str | None:
    """The reason why this backend cannot take a problem; None if it can."""
    if inputs.device.type != "cuda":
        return f"it runs on CUDA GPUs, and the inputs are on {inputs.device}"
    if weights.recurrent is None:
        return "without feedback there is nothing to keep on the chip"
    if inputs.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32 (TF32), float16 and bfloat16, not in {inputs.dtype}"
    if inputs.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "its float32 products are TF32, which torch.backends.cudnn.allow_tf32 = False rules out"
    if is_empty(inputs, weights.input):
        return "it needs at least one step and one sequence"
    if not torch.cuda.is_available():
        return "there is no GPU here, and the inputs only stand for some on one"
    if plan_for(Problem.of(cell, inputs, weights)) is None:
        return (
            f"the weights of {weights.recurrent.size(1)} units do not fit on this GPU's multiprocessors, or its "
            "compute capability is below 8.0"
        )
    return nvrtc.available()


def step_time(cell: Cell, inputs: Tensor, weights: Weights) -> float:
    """The estimated microseconds of a step, forward and backward, of a problem that is not refused."""
    problem = Problem.of(cell, inputs, weights)._replace(batch=round_up(likely(inputs.size(1))))
    plan = plan_for(problem)
    return float("inf") if plan is None else plan.step_time(problem.batch)


def forward(
    cell: Cell, inputs: Tensor, weights: Weights, hidden: Tensor | None, memory: Tensor | None, keep: Tensor | None
) -> Results:
    """The forward pass of :data:`PASSES`."""
    launch = PassLaunch("forward", cell, inputs, weights, keep)
    workspace = launch.workspace()
    given, weight = clear_and_align(workspace, inputs, weights.input)
    gates = project(given, weight, None)
    run = launch.forward(gates, hidden, memory, workspace)
    output = run.hiddens[1:] if keep is None else run.hiddens[1:].masked_fill(~keep.unsqueeze(-1), 0)
    return Results(output, run.last_hidden, run.last_memory, (gates, run.hiddens, run.memories, run.moments))


def backward(saved: Saved, grads: Gradients, needs: Sequence[bool]) -> Gradients:
    """The backward pass of :data:`PASSES`."""
    cell, inputs, weights, (gates, hidden, memory, moments) = saved.cell, saved.inputs, saved.weights, saved.own
    need_inputs, need_hidden, need_memory, *need_weights = needs
    launch = PassLaunch("backward", cell, inputs, weights, saved.keep)
    workspace = launch.workspace()
    operands = clear_and_align(workspace, *product_operands(weights, inputs, hidden, need_weights[1]))
    grad_output, grad_hidden, grad_memory = grads
    grad = launch.backward(gates, memory, moments, grad_output, grad_hidden, grad_memory, workspace)
    known = _summed(grad) if grad.gain is not None or grad.scale_i is not None or grad.scale_f is not None else {}
    grad_inputs, *rest = parameter_gradients(
        cell, weights, inputs, hidden, memory, gates, grad.gates, known, (need_inputs, *need_weights), operands
    )
    first_hidden = grad.first[0].to(hidden.dtype) if need_hidden else None
    return grad_inputs, first_hidden, grad.first[1] if need_memory else None, *rest


def _summed(grad: KernelGradients) -> dict[str, Tensor | None]:
    """The parameters' gradients by field: the kernel writes each row's share."""
    shares = {"norm_weight": grad.gain, "norm_bias": grad.shift, "sigma_f": grad.scale_f}
    known = {name: None if share is None else share.sum(0) for name, share in shares.items()}
    known["sigma_i"] = None if grad.scale_i is None else grad.scale_i.sum()
    return known


def own(extent: Extent) -> tuple[Sketch | None, ...]:
    """The gates, all h, all c, and the layer norm's means and reciprocal deviations."""
    steps, batch, size, gates, narrow, wide, norm = extent
    return (
        ((steps, batch, gates), narrow), ((steps + 1, batch, size), narrow), ((steps + 1, batch, size), wide),
        ((steps, batch, 2), wide) if norm else None,
    )  # fmt: skip


PASSES = Passes(forward, backward, own)
