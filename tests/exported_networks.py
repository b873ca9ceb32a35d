"""Modules of tensors alone, and their inputs, that several tests export."""

import warnings
from contextlib import contextmanager

import torch
from helpers import assert_close
from torch import Tensor, nn

from fairseq_rkm import RKM, RKMState

VARIANTS = [
    {},
    {"cell": "lstm"},
    {"cell": "linear_kernel", "learn_sigma": True, "bias": False, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "ngram": 3, "ngram_padding": "same", "layer_norm": True},
    {"cell": "linear_kernel_gated", "learn_sigma": True, "ngram": 2, "memory_clip": 0.3, "batch_first": True},
    {"cell": "ran", "feedback": False, "num_layers": 2},
    {"cell": "lstm", "proj_size": 2, "ngram": 2, "num_layers": 2},
]
"""Arguments of RKM that meet everything that an exporter meets."""

HALF = [(arguments, bool(i % 2)) for i, arguments in enumerate(VARIANTS)]
"""Each with a mask or without, for exporters that take seconds."""

SIZES = [(1, 1), (9, 3), (1, 2), (4, 1)]
"""Steps and batches other than an example's."""


class Whole(nn.Module):
    """An RKM from tensors to tensors: input, h, c, contexts, and perhaps a mask, to output, h, c, contexts."""

    def __init__(self, rkm: RKM, masked: bool) -> None:
        super().__init__()
        self.rkm, self.masked = rkm, masked

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        mask, context = (others[0], others[1:]) if self.masked else (None, others)
        output, state = self.rkm(x, RKMState(hidden, cell, list(context) or None), mask)
        return output, *state.tensors()

    def names(self) -> list[str]:
        """The inputs' names."""
        contexts = [f"context{i}" for i in range(self.rkm.num_layers) if self.rkm.ngram > 1]
        return ["x", "hidden", "cell", *(["mask"] if self.masked else []), *contexts]

    def axes(self) -> list[dict[int, str]]:
        """The inputs' dimensions that may change."""
        x = {0: "batch", 1: "time"} if self.rkm.batch_first else {0: "time", 1: "batch"}
        own = {"x": x, "mask": {0: "batch", 1: "time"}}
        return [own.get(name, {1: "batch"}) for name in self.names()]

    def inputs(self, steps: int, batch: int) -> tuple[Tensor, ...]:
        """Random inputs of a size; every row of a mask has padding at random places."""
        rkm = self.rkm
        shape = (batch, steps) if rkm.batch_first else (steps, batch)
        dtype = rkm.weight_ih_l0.dtype
        rows = rkm.num_layers * (1 + rkm.bidirectional)
        widths = [rkm.proj_size or rkm.hidden_size, rkm.hidden_size]
        state = torch.randn(rows, batch, sum(widths), dtype=dtype).split(widths, dim=2)  # views of one tensor
        mask = [torch.rand(batch, steps) > 0.7] if self.masked else []
        sizes = [rkm.layer_input_size(layer) for layer in range(rkm.num_layers if rkm.ngram > 1 else 0)]
        contexts = [torch.randn(rkm.ngram - 1, batch, size, dtype=dtype) for size in sizes]
        return torch.randn(*shape, rkm.input_size, dtype=dtype), *state, *mask, *contexts


EPISODES = [
    {"learn_initial_state": True, "ngram": 3, "num_layers": 2},
    {"cell": "lstm", "bidirectional": True, "ngram": 3, "ngram_padding": "same"},
]


class Episodes(nn.Module):
    """An RKM with resets, without a given state: input, mask and resets to output, memories and final state."""

    def __init__(self, rkm: RKM) -> None:
        super().__init__()
        self.rkm = rkm

    def forward(self, x: Tensor, mask: Tensor, reset: Tensor) -> tuple[Tensor, ...]:
        output, state, memories = self.rkm(x, padding_mask=mask, reset=reset, return_memory=True)
        return output, memories, *state.tensors()

    def inputs(self, steps: int, batch: int) -> tuple[Tensor, ...]:
        """Random inputs of a size."""
        x = torch.randn(steps, batch, 3, dtype=self.rkm.weight_ih_l0.dtype)
        return x, torch.rand(batch, steps) > 0.7, torch.rand(batch, steps) > 0.5


def assert_same(program, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A program gives what its network gives."""
    with torch.no_grad():
        given, wanted = program(*inputs), network(*inputs)
    assert len(given) == len(wanted)
    for i, (one, other) in enumerate(zip(given, wanted, strict=True)):
        assert one.dtype == other.dtype
        assert_close(one, other, f"result {i} of inputs {[tuple(t.shape) for t in inputs]}")


@contextmanager
def no_warnings_but_of_torchscript_s_end():
    """Warnings are errors here, save PyTorch's own on its deprecated exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
