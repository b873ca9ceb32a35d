"""The GPU backends for cells with feedback as one table: what the twins of their tests differ in.

``test_feedback_kernels.py`` runs each twin for each row. Tests that only one backend has are in its own file.
"""

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

from fairseq_rkm import CELLS, RKM
from fairseq_rkm.experiments.sweep_measurement import products_in
from fairseq_rkm.ops.backends.stepwise import step_loop
from ops.backends.triton_interpreter import DEVICE, INTERPRETED

FEEDBACK = [name for name, cell in CELLS.items() if cell.has_feedback]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SMALL = {"steps": 3, "batch": 3, "sizes": (2, 5)} if INTERPRETED else {"steps": 7, "batch": 5, "sizes": (6, 37)}
"""Of most problems. The interpreter takes seconds for one."""

Case = tuple[Any, ...]


@dataclass(frozen=True)
class Kernels:
    """A backend, and what its tests are given.

    Attributes:
        name: the backend's.
        norms: whether layers normalise the memory; all that it takes.
        variants: directions and padding.
        episodes: the same behind a dtype, for sequences that begin anew.
        odd_sizes: steps, batch and units.
        odd_arguments: the layers that have these sizes.
        units: of the layer whose runs are repeated.
        refusals: arguments of a layer, and the reason why it is refused.
        exact_units: of the layer whose products are exact float32 where TF32 is off; None if they never are.
        exact_clipping: whether a clipped memory is compared with products in float32.
        in_triton: whether its kernels run in Triton's interpreter.
    """

    name: str
    norms: tuple[bool, ...]
    variants: list[Case]
    episodes: list[Case]
    odd_sizes: list[tuple[int, int, int]]
    odd_arguments: list[dict[str, Any]]
    units: int
    refusals: list[tuple[dict[str, Any], str]]
    exact_units: int | None = None
    exact_clipping: bool = False
    in_triton: bool = False

    @property
    def tf32(self) -> bool:
        """Whether products of float32 are rounded as the test runs."""
        return not (INTERPRETED and self.in_triton)

    @property
    def device(self) -> str:
        """Where it is tested."""
        return DEVICE if self.in_triton else "cuda"

    def clipping_precision(self) -> AbstractContextManager[None]:
        """The products of a comparison of clipped memories: rounding may take a value across the bound."""
        return products_in("float32") if self.exact_clipping else nullcontext()

    def takes(self, cell: str, feedback: bool | None = None, layer_norm: bool = False, **_more: Any) -> bool:
        """Whether it is for a layer with these arguments."""
        return cell in FEEDBACK and feedback is not False and layer_norm in self.norms


_NOT_ITS_KIND = [({"dtype": torch.float64}, r"not in torch\.float64"), ({"feedback": False}, "without feedback")]
_ALL_VARIANTS = list(itertools.product((False, True), ("none", "mixed")))
_FLOAT32_WITH_PADDING = [(torch.float32, False, "mixed")]

KERNELS = [
    Kernels(
        "blockwise", norms=(False,), variants=_ALL_VARIANTS, episodes=_FLOAT32_WITH_PADDING,
        odd_sizes=[
            (2, 3, 5), (1, 1, 8), (63, 33, 100), (5, 140, 128), (6, 300, 65), (4, 600, 127), (4, 1100, 64), (9, 3, 51),
        ],
        odd_arguments=[{"cell": c} for c in ("rkm_lstm", "rkm_cifg", "linear_kernel_gated", "linear_kernel")],
        units=100,
        refusals=[
            *_NOT_ITS_KIND, ({"hidden_size": 129}, "layers of up to 128 units"),
            ({"layer_norm": True}, "does not normalise"),
        ],
        exact_units=100, exact_clipping=True,
    ),
    Kernels(
        "persistent", norms=(False, True), variants=_ALL_VARIANTS,
        episodes=[(dtype, *variant) for dtype in DTYPES for variant in _ALL_VARIANTS],
        odd_sizes=[(1, 1, 1), (3, 1, 8), (63, 33, 100), (5, 20, 1150), (4, 200, 500), (9, 3, 651)],
        odd_arguments=[{"layer_norm": False}, {"layer_norm": True}],
        units=300, refusals=[*_NOT_ITS_KIND, ({"hidden_size": 9000}, "weights of 9000 units do not fit")],
    ),
    Kernels(
        "stepwise", norms=(False, True), variants=[(False, "none"), (True, "mixed")], episodes=_FLOAT32_WITH_PADDING,
        odd_sizes=[(1, 1, 1), (3, 1, 8), (64, 33, 100), (5, 20, 1150), (85, 130, 60), (9, 3, 2049)],
        odd_arguments=[{"layer_norm": False}, {"layer_norm": True}],
        units=300, refusals=_NOT_ITS_KIND, exact_units=300, in_triton=True,
    ),
]  # fmt: skip
"""The table."""


def each(
    names: str, cases: Callable[[Kernels], Iterable[Case]] = lambda _kernels: [()], interpreted: bool = True
) -> pytest.MarkDecorator:
    """Run a test for each backend and each of its cases, on a GPU or in the interpreter.

    Args:
        names: of the test's arguments, ``"kernels"`` the first.
        cases: a backend's values of the other arguments.
        interpreted: whether the test also runs in Triton's interpreter.
    """
    parameters = []
    for kernels in KERNELS:
        here = interpreted and INTERPRETED and kernels.in_triton
        for case in cases(kernels):
            name = "-".join(map(str, (kernels.name, *case)))
            parameters.append(pytest.param(kernels, *case, id=name, marks=() if here else pytest.mark.gpu))
    return pytest.mark.parametrize(names, parameters)


def outcomes(rkm: RKM, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    output, _ = rkm(x)
    return [output.detach(), *torch.autograd.grad(output.float().pow(2).sum(), [x, *rkm.parameters()])]


def check_loops_are_shared():
    """Layers, lengths and batches of one kind take turns in one loop of ``stepwise``, without harm."""
    layers = [RKM(16, 100, backend="stepwise", device="cuda", memory_clip=1.0) for _ in range(2)]
    exact = [RKM(16, 100, backend="batched", device="cuda", memory_clip=1.0) for _ in range(2)]
    for layer, twin in zip(layers, exact, strict=True):
        twin.load_state_dict(layer.state_dict())
    for steps, batch in ((70, 8), (4, 3), (5, 5), (81, 1), (4, 8), (9, 7)):
        for layer, twin in zip(layers, exact, strict=True):
            x = torch.randn(steps, batch, 16, device="cuda")
            for given, wanted in zip(outcomes(layer, x), outcomes(twin, x), strict=True):
                assert_close(given, wanted, dtype="tf32")
    assert len(step_loop.LOOPS) == 4  # forward and backward, and both for one row
