"""The state of an RKM between two calls: a pair, as ``nn.LSTM``'s, that carries the n-gram context beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


class RKMState(tuple[Tensor, Tensor]):
    """The state after a sequence; the sequence's next piece starts from it.

    It is a pair, as the state of ``nn.LSTM``: ``h, c = state``. The n-gram context is an attribute of the pair. Code
    that takes the pair apart loses it: for n > 1, ``tuple(s.detach() for s in state)`` starts the next call with an
    empty context. :meth:`detach`, :meth:`map` and pytrees keep it. So do ``copy``, ``pickle`` and ``torch.save``.
    ``DistributedDataParallel`` with device ids and the older ``FullyShardedDataParallel`` take pairs apart, too. An RKM
    warns of a state that lost its context so. Hand them :meth:`tensors`, and make the state again of these.

    Attributes:
        hidden: ``h``, ``(num_layers * num_directions, B, d)``. Unbatched, all tensors lack the dimension ``B``.
        cell: the memory ``c``, of the same shape; with layer norm it is normalised. Float32 for models of 16 bits.
        context: each layer's last n - 1 inputs, ``(n - 1, B, layer_input_size)``, oldest first. None for n = 1.

    Example:
        >>> rnn = RKM(200, 400, ngram=3)
        >>> _, (h, c) = rnn(torch.randn(35, 20, 200))
        >>> _, state = rnn(torch.randn(35, 20, 200))
        >>> output, state = rnn(torch.randn(35, 20, 200), state.detach())  # goes on, without gradients to the first
    """

    context: list[Tensor] | None

    def __new__(cls, hidden: Tensor, cell: Tensor, context: list[Tensor] | None = None) -> "RKMState":
        self = tuple.__new__(cls, (hidden, cell))
        self.context = context
        return self

    @property
    def hidden(self) -> Tensor:
        """``h``."""
        return self[0]

    @property
    def cell(self) -> Tensor:
        """The memory ``c``."""
        return self[1]

    # Code that rebuilds tuples takes these for a named tuple and makes an RKMState: an RKM can then warn. PyTorch's
    # pytrees look for more, and keep to the registration below.
    @property
    def _fields(self) -> tuple[str, str]:
        return "hidden", "cell"

    def _asdict(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "cell": self.cell}

    def _replace(self, **changes: Any) -> "RKMState":
        return RKMState(**{"hidden": self.hidden, "cell": self.cell, "context": self.context, **changes})

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.hidden, self.cell, self.context)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden={self.hidden!r}, cell={self.cell!r}, context={self.context!r})"

    def tensors(self) -> list[Tensor]:
        """h, c and, for n-grams, the contexts."""
        return [self.hidden, self.cell, *(self.context or [])]

    def map(self, function: Callable[[Tensor], Tensor]) -> "RKMState":
        """Apply ``function`` to each tensor, in the order of :meth:`tensors`, and make a state of the results."""
        hidden, memory, *context = [function(tensor) for tensor in self.tensors()]
        return RKMState(hidden, memory, None if self.context is None else context)

    def detach(self) -> "RKMState":
        """The same state, cut from the graph."""
        return self.map(Tensor.detach)

    def to(self, *arguments: Any, **options: Any) -> "RKMState":
        """The same state on another device or of another dtype; the arguments are those of ``torch.Tensor.to``."""
        return self.map(lambda tensor: tensor.to(*arguments, **options))

    def pin_memory(self) -> "RKMState":
        """The same state in pinned memory; ``torch.utils.data`` calls it."""
        return self.map(Tensor.pin_memory)

    def index_select(self, rows: Tensor) -> "RKMState":
        """The states of these rows of the batch, ``(rows,)`` int64: a beam is reordered so."""
        return self.map(lambda tensor: tensor.index_select(1, rows))


def state_tensors(states: list[RKMState]) -> list[Tensor]:
    """Return all tensors of a stack's state, layer by layer."""
    return [tensor for state in states for tensor in state.tensors()]


def _children(state: RKMState) -> tuple[list[Any], None]:
    return [*state] if state.context is None else [*state, state.context], None


def _named_children(state: RKMState) -> tuple[list[tuple[Any, Any]], None]:
    names = [_pytree.GetAttrKey(name) for name in ("hidden", "cell", "context")]
    return list(zip(names, _children(state)[0], strict=False)), None


_pytree.register_pytree_node(
    RKMState,
    _children,
    lambda children, _: RKMState(*children),
    serialized_type_name="fairseq_rkm.RKMState",
    flatten_with_keys_fn=_named_children,
)
# Loading a state makes a tuple and runs nothing else. Files of earlier versions name the file where the class was.
torch.serialization.add_safe_globals([RKMState, (RKMState, "fairseq_rkm.modules.rkm.RKMState")])
