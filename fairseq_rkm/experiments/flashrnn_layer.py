"""FlashRNN's LSTM (Pöppel et al. 2024, the package ``flashrnn``) as a layer like ``torch.nn.LSTM``."""

import importlib
import importlib.util
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = ("bfloat16", "float16")
"""The dtypes in which it is compared: in 16 bits its products are the tensor cores', as ours are."""


def is_installed() -> bool:
    """Whether the package is there; its kernels are compiled at a shape's first use, by nvcc."""
    return importlib.util.find_spec("flashrnn") is not None


class FlashRNNLayer(nn.Module):
    """FlashRNN with the weights of an ``nn.LSTM`` of one layer; the inputs' product is PyTorch's.

    Args:
        lstm: the layer whose parameters it shares.
        backend: FlashRNN's own name of one of its kernels.
    """

    def __init__(self, lstm: nn.LSTM, backend: str = "cuda_fused") -> None:
        super().__init__()
        self.lstm, self.backend = lstm, backend
        self._run: Any = importlib.import_module("flashrnn").flashrnn

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From ``(T, B, m)`` to ``(T, B, d)``, and the last h and c, ``(2, B, 1, 1, d)``."""
        weights: dict[str, Tensor] = dict(self.lstm.named_parameters())
        size = self.lstm.hidden_size
        gates = F.linear(x, weights["weight_ih_l0"]).unflatten(-1, (4, 1, size)).transpose(0, 1)
        bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        states, last = self._run(
            gates, weights["weight_hh_l0"].view(4, 1, size, size), bias.view(4, 1, size), function="lstm",
            backend=self.backend, dtype=str(x.dtype).removeprefix("torch."),
        )  # fmt: skip
        return states[0, :, :, 0].transpose(0, 1), last
