"""The time of derivatives that the fast backends leave to the reference, against ordinary gradients."""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from fairseq_rkm import RKM, RKMError
from fairseq_rkm.experiments.recurrence_benchmark import timed


def derivatives(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``derivatives``: print the milliseconds of each way, and how often ordinary gradients fit in.

    Returns:
        A row for each shape.

    Raises:
        SystemExit: no such device is there, or an argument is refused.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmark: no CUDA device here; use --device cpu")
    torch.manual_seed(args.seed)
    rows = []
    for shape in args.shape:
        length, batch, size, hidden = shape
        try:
            rkm = RKM(size, hidden, cell=args.cell, device=args.device)
        except RKMError as error:
            raise SystemExit(f"benchmark: {error}") from error
        ways = ways_of(rkm, torch.randn(length, batch, size, device=args.device))
        medians = [statistics.median(times) for times in timed(list(ways.values()), args.device, args.seconds)]
        print(f"{args.cell}, T, B, m, d = {', '.join(map(str, shape))}")
        for name, median in zip(ways, medians, strict=True):
            print(f"{name:<42} {median:9.2f} ms {median / medians[0]:7.1f} x")
        rows.append({"cell": args.cell, "shape": shape, "ms": dict(zip(ways, medians, strict=True))})
    return rows


def ways_of(rkm: RKM, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The ways to differentiate, by name; the first is the ordinary one."""
    parameters: dict[str, Any] = dict(rkm.named_parameters())

    def loss(parameters: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = functional_call(rkm, parameters, (x,))[0]
        return output.square().sum()

    def ordinary() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(parameters, x), list(parameters.values()))

    def penalty() -> tuple[torch.Tensor, ...]:
        inputs = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(loss(parameters, inputs), inputs, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(parameters.values()), allow_unused=True)

    def each_sample() -> dict[str, torch.Tensor]:
        run: Callable[..., dict[str, torch.Tensor]] = vmap(grad(loss), (None, 1))
        return run({name: p.detach() for name, p in parameters.items()}, x.unsqueeze(2))

    def one_by_one() -> list[tuple[torch.Tensor, ...]]:
        samples = x.split(1, dim=1)
        return [torch.autograd.grad(loss(parameters, sample), list(parameters.values())) for sample in samples]

    return {
        "gradients of the weights": ordinary,
        "a penalty on gradients (create_graph)": penalty,
        "torch.func.grad": lambda: grad(loss)({name: p.detach() for name, p in parameters.items()}, x),
        "gradients of each sample, vmap(grad)": each_sample,
        "gradients of each sample, one by one": one_by_one,
    }
