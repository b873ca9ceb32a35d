"""Projections (``proj_size``, Sak et al. 2014) without a kernel of their own.

The cell's own output is ``h'_t``, ``(B, d)``, and ``P = weight_hr`` has p rows. The layer's output is ``h_t = P h'_t``.
The gates see ``U h_{t-1}``, where U has p columns. ``U P`` is a recurrent matrix of the plain cell, so the backends run
on ``h'_t``, and one product over all steps gives ``h_t``. A given ``h_0`` is in general no ``P h'`` of anything. It
enters as p more features of the input, which are zero at all but a row's first real step. After a reset the learned
``h_0`` enters in the same way.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops import Weights
from fairseq_rkm.ops.cells import Cell


class Projection:
    """The projection of one call of a layer and direction, and the hidden states that its sequences start from.

    Args:
        matrix: P, ``(p, d)``.
        hidden: ``h_0``, ``(B, p)``; None for zeros.
        fresh: what a reset begins with, ``(p,)``; None for zeros.
        keep: ``(T, B)`` bool, True at real steps; None if all steps are real.
        reset: ``(T, B)`` bool, True where a sequence begins anew; None if it nowhere does.

    Raises:
        RKMError: ``hidden`` is on another device, or of whole numbers.
    """

    def __init__(
        self, matrix: Tensor, hidden: Tensor | None, fresh: Tensor | None, keep: Tensor | None, reset: Tensor | None
    ) -> None:
        if hidden is not None:
            _check(hidden, matrix)
        self.matrix, self.hidden, self.fresh, self.keep, self.reset = matrix, hidden, fresh, keep, reset

    def fold(self, cell: Cell, inputs: Tensor, weights: Weights, ahead: int) -> tuple[Tensor, Weights]:
        """Inputs and weights of a plain layer that has the same ``h'_t``; its sequences start from zeros.

        Args:
            cell: the cell.
            inputs: extended inputs, ``(T + n - 1, B, m)``.
            weights: the layer's; ``recurrent`` is U, ``(recurrent_gates * d, p)``, or None without feedback.
            ahead: the inputs after its step that a window holds.
        """
        if weights.recurrent is None:
            return inputs, weights
        plain = weights._replace(recurrent=weights.recurrent @ self.matrix)
        ngram = weights.input.size(1) // inputs.size(2)
        behind = ngram - 1 - ahead
        entering = self._entering(inputs, inputs.size(0) - ngram + 1)
        if entering is None:
            return inputs, plain
        inputs = torch.cat([inputs, F.pad(entering.to(inputs.dtype), (0, 0, 0, 0, behind, ahead))], dim=2)
        # The recurrent gates are one block, in order (ops/cells.py). A window's newest input comes first.
        above = cell.gates.index(cell.recurrent_gates[0]) * self.matrix.size(1)
        below = weights.input.size(0) - above - weights.recurrent.size(0)
        of_step = F.pad(weights.recurrent, (0, 0, above, below)).unsqueeze(1)
        taps = weights.input.unflatten(1, (ngram, -1))
        both = torch.cat([taps, F.pad(of_step, (0, 0, ahead, behind))], dim=2)
        return inputs, plain._replace(input=both.flatten(1))

    def apply(self, output: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
        """``h_t``, ``(T, B, p)``, and the final ``h``, ``(B, p)``, from the plain layer's ``h'_t`` and final ``h'``."""
        return F.linear(output, self.matrix), self._leaving(F.linear(final, self.matrix), output.size(0))

    def _entering(self, x: Tensor, steps: int) -> Tensor | None:
        """``h_{t-1}`` of the steps before which no other real step of their sequence is, ``(T, B, p)``; else zero.

        Args:
            x: ``(.., B, m)``.
            steps: T.
        """
        if self._are_zeros:
            return None
        real, begun = self._events(steps, x.size(1), x.device)
        is_first = real[:-1] < begun[1:].clamp(min=1)
        is_first = is_first if self.keep is None else is_first & self.keep
        return torch.where(is_first.unsqueeze(2), self._state(begun[1:]), 0.0)

    def _leaving(self, final: Tensor, steps: int) -> Tensor:
        """The final ``h``, ``(B, p)``: ``final``, or the start of a row's last sequence if it has no real step."""
        if self._are_zeros:
            return final
        real, begun = self._events(steps, final.size(0), final.device)
        is_start = real[-1] < begun[-1].clamp(min=1)
        return torch.where(is_start.unsqueeze(1), self._state(begun[-1]).to(final.dtype), final)

    @property
    def _are_zeros(self) -> bool:
        return self.hidden is None and (self.fresh is None or self.reset is None)

    def _events(self, steps: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The last real step and the last reset up to each step, counted from 1, after a row of zeros; 0 for none."""
        number = torch.arange(steps + 1, device=device).unsqueeze(1).expand(-1, batch)
        real, begun = (mask if mask is None else F.pad(mask, (0, 0, 1, 0)) for mask in (self.keep, self.reset))
        if real is None:
            real = number
        elif self.reset is None:  # any number of real steps will do, and ONNX has no running maximum
            real = real.long().cumsum(0)
        else:
            real = torch.where(real, number, 0).cummax(0).values
        begun = torch.zeros_like(number) if begun is None else torch.where(begun, number, 0).cummax(0).values
        return real, begun

    def _state(self, begun: Tensor) -> Tensor:
        """The start of sequences that began at these resets, or were given: ``(..., p)``."""
        given: Tensor | float = 0.0 if self.hidden is None else self.hidden
        fresh: Tensor | float = 0.0 if self.fresh is None else self.fresh
        return torch.where((begun > 0).unsqueeze(-1), fresh, given)


def _check(hidden: Tensor, matrix: Tensor) -> None:
    if hidden.device != matrix.device:
        raise RKMError(
            f"the inputs are on {matrix.device} but the hidden state on {hidden.device}; move them to one device"
        )
    if not hidden.is_floating_point():
        raise RKMError(f"the hidden state must be floating-point numbers, not {hidden.dtype}")
