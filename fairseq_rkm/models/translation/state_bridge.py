"""The initial state of a decoder layer of ``rkm``, from an encoder layer's final state."""

from torch import Tensor, nn

from fairseq_rkm.modules import RKM, RKMState
from fairseq_rkm.ops import CELLS
from fairseq_rkm.ops.weights import memory_dtype


class StateBridge(nn.Module):
    """Map an encoder layer's final state to a decoder layer's initial state: h and c each through an affine map.

    A layer without feedback reads no h, and a layer without memory no c. These are then zeros and have no map.

    Args:
        source_size: e, the size of the encoder's h and c.
        layer: the decoder's layer.
    """

    def __init__(self, source_size: int, layer: RKM) -> None:
        super().__init__()
        self.size = layer.hidden_size
        self.context_size = layer.ngram - 1, layer.input_size
        self.hidden = nn.Linear(source_size, self.size) if layer.feedback else None
        # For the memory; checkpoints know it as cell.
        self.cell = nn.Linear(source_size, self.size) if CELLS[layer.cell].has_memory else None

    def forward(self, hidden: Tensor, memory: Tensor) -> RKMState:
        """Map ``hidden`` and ``memory``, ``(B, e)`` each, to a state of ``(1, B, d)`` tensors."""
        mapped = [
            hidden.new_zeros(hidden.size(0), self.size) if map_ is None else map_(value.to(hidden.dtype))
            for map_, value in ((self.hidden, hidden), (self.cell, memory))
        ]
        steps, size = self.context_size
        context = [hidden.new_zeros(steps, hidden.size(0), size)] if steps else None
        return RKMState(mapped[0].unsqueeze(0), mapped[1].to(memory_dtype(hidden.dtype)).unsqueeze(0), context)
