"""Weights that an RKM and an ``nn.LSTM`` exchange: by ``load_state_dict``, ``from_lstm`` and ``to_lstm``."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules.lstm_weights import (
    GATES_OF_TORCH,
    LSTM_GATES,
    STACKED,
    check_not_reparametrized,
    converted,
    copy_from_lstm,
    copy_to_lstm,
    is_of_torch,
    may_be_of_torch,
    restack,
)
from fairseq_rkm.modules.parameters import RKMParameters


class ExchangeWithLSTM(RKMParameters):
    """The parameters of an RKM, loaded from and made into an ``nn.LSTM``'s."""

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """As every module's, without the mark, which is empty: ``opacus`` takes no layer with buffers."""
        return (value for name, value in self.named_buffers(recurse=recurse) if name != self._mark)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        """Load weights and convert an ``nn.LSTM``'s. ``state_dict`` is a copy, as for every module of PyTorch."""
        self._in_doubt = False
        names = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        names = [name for name in names if "." not in name or name.startswith("parametrizations.")]
        own = {name: state_dict[prefix + name] for name in names if "." not in name}
        if is_of_torch(names):
            self._check_is_lstm()
            check_not_reparametrized(names)
            for name in own:
                del state_dict[prefix + name]
            state_dict.update((prefix + name, value) for name, value in converted(own, self.gates).items())
            self._start_at_zeros(state_dict, prefix)
        elif self._like_torch and may_be_of_torch(names):
            if "version" not in local_metadata:
                raise RKMError(
                    f"the weights {prefix}weight_ih_l0, ... have no biases and do not say whose they are, and "
                    f"{GATES_OF_TORCH[len(self.gates)]}'s of these names and shapes would be another function here. "
                    "If they are its, take RKM.from_lstm of an nn.LSTM that has loaded them. If they are an RKM's, "
                    f"saved before this was told, say so: state_dict[{prefix + self._mark!r}] = torch.empty(0)"
                )
            self._in_doubt = True
            self._start_at_zeros(state_dict, prefix)
        if self._mark in self._buffers:
            state_dict.setdefault(prefix + self._mark, self._buffers[self._mark])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _settle(self) -> None:
        """Convert weights without biases, once loaded, if they are an ``nn.LSTM``'s.

        A state dict records each module beside the tensors, and each module is told of its own record alone. A record
        of this RKM without one of its dropout comes from another module.
        """
        if not self._in_doubt or self.dropout.recorded:
            return
        self._check_is_lstm()
        weights = dict(self.named_parameters()) | dict(self.named_buffers())
        check_not_reparametrized(list(weights))
        for name, tensor in weights.items():
            if name.startswith(STACKED):
                tensor.data = restack(tensor.data, LSTM_GATES, self.gates)

    def _start_at_zeros(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Complete weights that are, or may be, an ``nn.LSTM``'s: it starts from zeros."""
        for name, parameter in self.named_parameters():
            if name.startswith("initial"):
                state_dict.setdefault(prefix + name, torch.zeros_like(parameter))

    def _check_is_lstm(self) -> None:
        if self.cell != "lstm" or not self.feedback or self.kernel != "linear":
            own = "" if self.feedback else " without feedback"
            own += "" if self.kernel == "linear" else f" through the kernel {self.kernel!r}"
            raise RKMError(
                "weights of nn.LSTM, nn.GRU or nn.RNN are no weights of this RKM, which is another function "
                f"(cell {self.cell!r}{own}): only cell='lstm' takes nn.LSTM's, with the linear kernel"
            )

    @classmethod
    def from_lstm(cls, lstm: nn.LSTM) -> Self:
        """Make an RKM with ``cell="lstm"`` that computes the same function as ``lstm``; the weights are copied.

        A pruned, normalised or parametrized weight is copied as a call in evaluation uses it. What is frozen stays
        frozen. The RKM's bias is the sum of the LSTM's two, and is trained if one of them is.

        Raises:
            RKMError: ``lstm`` is another module.
        """
        if not isinstance(lstm, nn.LSTM):
            raise RKMError(f"from_lstm takes a torch.nn.LSTM, not a {type(lstm).__name__}")
        first: Any = lstm.weight_ih_l0
        rkm = cls(
            lstm.input_size, lstm.hidden_size, lstm.num_layers, "lstm", bias=lstm.bias, dropout=lstm.dropout,
            bidirectional=lstm.bidirectional, batch_first=lstm.batch_first, device=first.device, dtype=first.dtype,
            proj_size=lstm.proj_size,
        )  # fmt: skip
        copy_from_lstm(lstm, rkm, rkm.gates)
        return rkm.train(lstm.training)

    def to_lstm(self) -> nn.LSTM:
        """Make an ``nn.LSTM`` that computes the same function; the weights are copied.

        ``nn.LSTM`` has no weight dropout: it is left behind. Pruned, normalised or parametrized weights and frozen
        ones are copied as by :meth:`from_lstm`. The second of the LSTM's two biases is zero.

        Raises:
            RKMError: ``nn.LSTM`` cannot compute this cell, n-gram, feedback, layer norm or bound, or start from the
                learned initial state.
        """
        other = self.cell != "lstm" or self.kernel != "linear" or self.ngram > 1 or not self.feedback
        if other or self.layer_norm or self.memory_clip:
            raise RKMError(
                "only cell='lstm' with the linear kernel, ngram 1, feedback, no layer norm and no clipping is an "
                "nn.LSTM"
            )
        if self.learn_initial_state and any(tensor.any() for tensor in self.initial_state()):
            raise RKMError(
                "nn.LSTM starts from zeros and has no place for a learned initial state: set the parameters "
                "initial_... to zero here, and give the LSTM their values as its hx"
            )
        first: Any = self.weight_ih_l0
        lstm = nn.LSTM(
            self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first, self.dropout.p,
            self.bidirectional, self.proj_size, device=first.device, dtype=first.dtype,
        )  # fmt: skip
        copy_to_lstm(self, lstm, self.gates)
        return lstm.train(self.training)
