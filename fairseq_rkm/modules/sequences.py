"""The layouts of sequences that ``nn.LSTM`` takes: a batch (time first or batch first), one alone, or packed.

A recurrence runs over ``(T, B, m)``. A layout leads to this form and back.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.state import RKMState


class Batch:
    """A batch of sequences, ``(T, B, m)`` or, batch first, ``(B, T, m)``.

    Attributes:
        steps: the inputs, ``(T, B, m)``.
        keep: ``(T, B)`` bool, True at real steps, where the layout tells it; else None.
        batched: whether states and masks have a dimension for the batch.
    """

    keep: Tensor | None = None
    batched = True

    def __init__(self, x: Tensor, batch_first: bool) -> None:
        self.steps = x.transpose(0, 1) if batch_first else x
        self.batch_first = batch_first

    def restored(self, output: Tensor) -> Tensor:
        """An output, ``(T, B, d)``, in the layout of the inputs."""
        return output.transpose(0, 1) if self.batch_first else output

    def marks(self, marks: Tensor) -> Tensor:
        """A user's marks at steps as ``(B, T)``."""
        return marks

    def entering(self, state: RKMState) -> RKMState:
        """A user's state with the rows of ``steps``, all tensors ``(..., B, features)``."""
        return state

    def leaving(self, state: RKMState) -> RKMState:
        """Reverse :meth:`entering`."""
        return state


class Single(Batch):
    """One sequence without a batch, ``(T, m)``, whatever ``batch_first`` says, as in ``nn.LSTM``."""

    batched = False

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.unsqueeze(1), batch_first=False)

    def restored(self, output: Tensor) -> Tensor:
        return output.squeeze(1)

    def marks(self, marks: Tensor) -> Tensor:
        return marks.unsqueeze(0)

    def entering(self, state: RKMState) -> RKMState:
        return state.map(lambda tensor: tensor.unsqueeze(1))

    def leaving(self, state: RKMState) -> RKMState:
        return state.map(lambda tensor: tensor.squeeze(1))


class Packed(Batch):
    """A ``PackedSequence``: its rows are sorted by length. States are in the order of the user's batch."""

    def __init__(self, packed: PackedSequence) -> None:
        self.packed = packed
        # Without the indices torch leaves the rows in their sorted order: outputs then need no sorting.
        x, self.lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        super().__init__(x, batch_first=False)
        sizes = packed.batch_sizes
        if sizes[0] != sizes[-1]:
            rows = torch.arange(x.size(1), device=x.device)
            self.keep = rows < sizes.to(x.device).unsqueeze(1)

    def restored(self, output: Tensor) -> PackedSequence:  # type: ignore[override]
        data = pack_padded_sequence(output, self.lengths).data
        packed = self.packed
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    def marks(self, marks: Tensor) -> Tensor:
        order = self.packed.sorted_indices
        return marks if order is None else marks.index_select(0, order)

    def entering(self, state: RKMState) -> RKMState:
        order = self.packed.sorted_indices
        if order is None:
            return state
        for tensor in state:
            if tensor.device != order.device:
                raise RKMError(
                    f"the inputs are on {order.device} but the state on {tensor.device}; move them to one device"
                )
        return state.index_select(order)

    def leaving(self, state: RKMState) -> RKMState:
        order = self.packed.unsorted_indices
        return state if order is None else state.index_select(order)


def layout_of(x: Tensor | PackedSequence, batch_first: bool) -> Batch:
    """The layout of an input of 2 or 3 dimensions, or packed."""
    if isinstance(x, PackedSequence):
        return Packed(x)
    return Single(x) if x.dim() == 2 else Batch(x, batch_first)
