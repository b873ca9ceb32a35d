"""What several tests share: the table of tolerances, and random problems."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_rkm import RKM
from fairseq_rkm.modules import rkm as rkm_module

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""The parameters of a test that runs on both; see ``conftest.py`` for where there is no GPU."""

TOLERANCES: dict[torch.dtype | str, float] = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    "tf32": 4e-3,  # the mantissa of float16
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""How far from the reference a result may be, ``||given - wanted|| / ||wanted||``; never relaxed for a test."""


def product_type(dtype: torch.dtype, device: str) -> torch.dtype | str:
    """In what type matrix products of a type are computed, as the table of tolerances has it."""
    rounded = device == "cuda" and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounded else dtype


def assert_close(given: Tensor, wanted: Tensor, what: str = "", dtype: torch.dtype | str | None = None) -> None:
    """Within the tolerance of ``dtype``, by default the given tensor's."""
    assert given.shape == wanted.shape, f"{what}: shape {tuple(given.shape)}, not {tuple(wanted.shape)}"
    given, wanted, tolerance = given.double(), wanted.double(), TOLERANCES[dtype or given.dtype]
    error, size = (given - wanted).norm().item(), wanted.norm().item()
    assert error <= tolerance * size + 1e-15, (
        f"{what}: off by {error / max(size, 1e-30):.1e}, more than {tolerance:.0e}"
    )


def run_at_once(run: Callable[[], None], _pool: object) -> Callable[[], None]:
    """What stands in for a graph on a CPU: recording draws no random numbers, and to replay is to run again."""
    with torch.random.fork_rng():
        run()
    return run


def randomized(rkm: RKM, seed: int = 0) -> RKM:
    """The module with all parameters (norms and sigmas too) away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rkm.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            fan_in = parameter.size(-1) if parameter.dim() > 1 else 1
            parameter.add_(0.2 / fan_in**0.5 * noise.to(parameter.dtype))
    return rkm


def random_mask(kind: str, batch: int, steps: int) -> Tensor | None:
    """``(B, T)``, True at padding: none, on the left, on the right, or on both with one row all padding."""
    if kind == "none":
        return None
    mask = torch.zeros(batch, steps, dtype=torch.bool)
    for row in range(batch):
        width = min(steps, row)
        if kind in ("left", "mixed"):
            mask[row, :width] = True
        if kind in ("right", "mixed") and width:
            mask[row, -width:] = True
    if kind == "mixed":
        mask[-1] = True
    return mask


def join_scales(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results in which the gradients of ``s_i``, one number a layer, and ``s_f`` are one vector.

    A single number is a sum that may all but cancel: in rounded arithmetic its relative error then says nothing.
    """
    joined = dict(results)
    for name in results:
        if "sigma_i" in name and name.replace("sigma_i", "sigma_f") in results:
            other = name.replace("sigma_i", "sigma_f")
            joined[other] = torch.cat([joined.pop(name).view(1), joined[other]])
    return joined


def random_reset(batch: int, steps: int) -> Tensor:
    """``(B, T)``, True where a sequence begins anew: at the first step of one row, and here and there."""
    reset = torch.rand(batch, steps, generator=torch.Generator().manual_seed(5)) < 0.3
    reset[:1, :1] = True
    return reset


def forward_and_gradients(
    rkm: RKM, x: Tensor, hidden: Tensor, cell: Tensor, context, mask, **options
) -> dict[str, Tensor]:
    """Everything that a call gives: outputs, final state, and all gradients of a random projection of them."""
    leaves = {"x": x, "hidden": hidden, "cell": cell}
    leaves |= {f"context{i}": c for i, c in enumerate(context or [])}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    contexts = [leaves[f"context{i}"] for i in range(len(context))] if context else None
    output, state, *memories = rkm(leaves["x"], (leaves["hidden"], leaves["cell"], contexts), mask, **options)
    results = {"memories": memories[0]} if memories else {}
    results |= {"output": output, "final hidden": state.hidden, "final cell": state.cell}
    results |= {f"final context{i}": c for i, c in enumerate(state.context or [])}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for value in results.values():
        weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        loss = loss + (value.double() * weights).sum()
    wanted = {**leaves, **dict(rkm.named_parameters())}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return results | {f"gradient of {name}": g for name, g in zip(wanted, gradients, strict=True)}


def training_losses(
    updates: int, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **arguments
) -> Tensor:
    """The losses of a small regression trained with a backend, from the same start whatever the backend."""
    torch.manual_seed(0)
    rkm = RKM(16, 24, **{"layer_norm": True, **arguments}, backend=backend, dtype=dtype).to(device)
    optimizer = torch.optim.SGD(rkm.parameters(), lr=0.02)
    x, target = torch.randn(12, 8, 16, dtype=dtype).to(device), torch.randn(12, 8, 24, dtype=dtype).to(device)
    losses = []
    for _ in range(updates):
        loss = (rkm(x)[0] - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().cpu())
    assert losses[-1] < 0.99 * losses[0]
    return torch.stack(losses)


def watch_short_way(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Write down which way each call of an RKM goes: ``"short"``, by the function of this name, or ``"long"``."""
    taken_by, gone = getattr(rkm_module, name), []

    def watched(*arguments: Any) -> Any:
        taken = taken_by(*arguments)
        gone.append("long" if taken is None else "short")
        return taken

    monkeypatch.setattr(rkm_module, name, watched)
    return gone
