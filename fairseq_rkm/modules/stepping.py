"""Single steps without gradients, for decoding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.rkm import RKM
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.ops.kernel_candidates import filters_of
from fairseq_rkm.ops.reference import step
from fairseq_rkm.ops.weights import memory_dtype


class Stepper:
    """A layer's weights, packed for single steps: a step costs one matrix product and little Python.

    A step equals one of the layer's in evaluation, by the reference's equations. The weights are packed once: make a
    new stepper for each sequence to decode.

    Args:
        layer: an RKM of one layer and one direction, with causal n-grams.

    Raises:
        RKMError: any other RKM.

    Example:
        >>> layer = RKM(200, 400).eval()
        >>> step = Stepper(layer)
        >>> with torch.no_grad():
        ...     output, state = step(torch.randn(1, 20, 200), layer.initial_state(20))  # (1, 20, 400)
    """

    def __init__(self, layer: RKM) -> None:
        if layer.num_layers > 1 or layer.bidirectional or (layer.ngram > 1 and layer.ngram_padding != "causal"):
            raise RKMError("single steps are for one layer in one direction, with causal n-grams")
        self.ngram = layer.ngram
        self.feedback = layer.feedback
        self.cell = layer._cell
        weights = layer._weights("l0", None)
        wide = memory_dtype(weights.input.dtype)
        packed = weights.input
        # A kernel reads the weights of z apart: those of gates that do not see h_{t-1} are no part of a norm.
        self.packed = self.cell.kernel.is_linear
        if weights.recurrent is not None and self.packed:
            # The recurrent gates are one block, in order (ops/cells.py); the other gates get zeros for h_{t-1}.
            first = layer.gates.index(layer.recurrent_gates[0]) * layer.hidden_size
            last = packed.size(0) - first - weights.recurrent.size(0)
            packed = torch.cat([packed, F.pad(weights.recurrent, (0, 0, first, last))], dim=1)
            weights = weights._replace(recurrent=None)
        self.projection = layer._projection("l0", None) if layer.proj_size else None
        self.weights = weights._replace(input=packed).laid_out(wide)
        self.filters = None if self.packed else filters_of(self.cell, self.weights)
        self.memory_dtype = wide

    def tensors(self) -> list[Tensor]:
        """The packed weights."""
        every = *self.weights.tensors(), self.projection, *(self.filters or ())
        return [weight for weight in every if weight is not None]

    def __call__(self, x: Tensor, state: RKMState) -> tuple[Tensor, RKMState]:
        """The step's output, ``(1, B, d)``, and the next state.

        Args:
            x: ``(1, B, m)``, one step's input.
            state: the layer's state; a context of None stands for zeros.
        """
        window, context = [x[0]], state.context
        if self.ngram > 1:
            past = context[0] if context else x.new_zeros(self.ngram - 1, *x.shape[1:])
            window += past.flip(0).unbind()
            context = [torch.cat([past[1:], x])]
        hidden, memory = state.hidden[0], state.cell[0].to(self.memory_dtype)
        if self.feedback and self.packed:
            window.append(hidden)
        extended = torch.cat(window, dim=1) if len(window) > 1 else window[0]
        hidden, memory = step(self.cell, extended, self.weights, hidden, memory, self.filters)
        if self.projection is not None:
            hidden = F.linear(hidden, self.projection)
        return hidden.unsqueeze(0), RKMState(hidden.unsqueeze(0), memory.unsqueeze(0), context)
