"""Floating-point operations of an operator's products, for ``torch.utils.flop_counter``."""

from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fairseq_rkm.ops.passes import Saved


def teach_counters(operator: Any, flops: Any) -> None:
    """Have the counters that are at work count an operator by ``flops(*arguments, out_val)``.

    A registry of formulas takes 0.3 s to import: it is not imported here, and a counter copies it when it is made.
    """
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(registry, dict):
            registry.setdefault(operator.overloadpacket, flops)
            registry.setdefault(operator, flops)


def forward_flops(problem: Saved) -> int:
    """Of ``W X_t`` and ``U h_{t-1}`` at all steps; pointwise work is not counted, as PyTorch's."""
    weights = problem.weights
    return _products(problem, weights.input.numel() + _recurrent(problem))


def backward_flops(problem: Saved, needs: list[bool]) -> int:
    """Of the gradients of inputs and matrices that are needed, and of ``h_{t-1}``."""
    need_inputs, _, _, need_input, need_recurrent, *_ = needs
    size = problem.weights.input.numel() * (need_inputs + need_input) + _recurrent(problem) * (1 + need_recurrent)
    return _products(problem, size)


def _recurrent(problem: Saved) -> int:
    return 0 if problem.weights.recurrent is None else problem.weights.recurrent.numel()


def _products(problem: Saved, elements: int) -> int:
    inputs, weight = problem.inputs, problem.weights.input
    steps = inputs.size(0) - weight.size(1) // inputs.size(2) + 1
    return 2 * steps * inputs.size(1) * elements
