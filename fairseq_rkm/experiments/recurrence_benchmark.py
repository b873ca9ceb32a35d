"""Check recurrences against the reference, then time them against ``torch.nn.LSTM``."""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_rkm import CELLS, RKM, RKMError
from fairseq_rkm.experiments.result_files import pyplot
from fairseq_rkm.modules.side_by_side import stretches

TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest ``||given - wanted|| / ||wanted||`` allowed, by dtype; float32's leaves room for TF32."""


def error_of(rkm: RKM, x: Tensor) -> float:
    """The largest relative error of output and gradients against the reference in float64, on 3 rows and 40 steps."""
    return largest_error(rkm, x[:40, :3].detach())


def largest_error(rkm: RKM, piece: Tensor) -> float:
    """As :func:`error_of`, on inputs of your choice."""
    wanted = outcome(reference_of(rkm), piece.double())
    given = outcome(rkm, piece)
    return largest(((g.double() - w).norm() / w.norm()).item() for g, w in zip(given, wanted, strict=True))


def largest(errors: Iterable[float]) -> float:
    """The largest error, and NaN if one is: Python's ``max`` passes NaN over."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def reference_of(rkm: RKM) -> RKM:
    """The same layer in float64, by the reference."""
    copy = RKM(
        rkm.input_size, rkm.hidden_size, rkm.num_layers, cell=rkm.cell, ngram=rkm.ngram, layer_norm=rkm.layer_norm,
        memory_clip=rkm.memory_clip, bidirectional=rkm.bidirectional,
        feedback=None if rkm.feedback == CELLS[rkm.cell].has_feedback else False, backend="reference",
        device=rkm.get_parameter("weight_ih_l0").device, dtype=torch.float64, kernel=rkm.kernel,
        kernel_degree=rkm.kernel_degree,
    )  # fmt: skip
    copy.load_state_dict(rkm.state_dict())
    return copy


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """A layer's output, and the gradients of inputs and parameters of a fixed projection of it."""
    x = x.clone().requires_grad_()
    output, _ = layer(x)
    # float16 cannot count to 65,536, and torch.linspace would count in it.
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device=x.device).view_as(output)
    weights = weights.to(output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), [x, *layer.parameters()])
    return [output.detach(), *gradients]


CALLS = 8
"""The calls of one measurement on a GPU, launched without waiting, as in training; their mean counts."""
TURNS = 20
"""The number of turns of each contender, at most: other work of the machine then meets all alike."""


def timed(runs: list[Callable[[], Any]], device: str, seconds: float, calls: int = CALLS) -> list[list[float]]:
    """Time each function for ``seconds``, at least 5 times, after warming up; the milliseconds of every call.

    Args:
        runs: the contenders.
        device: ``"cpu"`` or ``"cuda"``.
        seconds: the time for each.
        calls: the calls of one measurement on a GPU.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        for _ in range(5):
            run()
    stop = time.perf_counter() + seconds * len(runs)
    while len(times[-1]) < 5 or time.perf_counter() < stop:
        for run, own in zip(runs, times, strict=True):
            run()  # not timed: another contender has filled the caches
            turn = time.perf_counter() + seconds / TURNS
            own.append(once(run, device, calls))
            while time.perf_counter() < turn:
                own.append(once(run, device, calls))
    return times


def once(run: Callable[[], Any], device: str, calls: int = CALLS) -> float:
    """The milliseconds of a call; on a GPU the mean of ``calls`` calls."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    before = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - before)


def forward_backward(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward, as PyTorch runs them."""

    def run() -> None:
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(grad)

    return run


def graphed(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Forward and backward as a CUDA graph: the GPU's work without the host's time to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module.zero_grad(set_to_none=True)
            module(x)[0].backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    module.zero_grad(set_to_none=True)
    x.grad = None
    with torch.cuda.graph(graph):
        module(x)[0].backward(grad)
    return graph.replay


def kept_memory(module: nn.Module, x: Tensor) -> int | None:
    """The bytes that a forward pass keeps for the backward pass, with its output; None on a CPU."""
    if x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = module(x)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del output
    return kept


def runs_of(module: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The functions to time for a module, by name."""
    inputs = x.detach()  # nn.LSTM runs other code for inputs that require gradients, even without one to compute

    def forward() -> None:
        with torch.no_grad():
            module(inputs)

    grad = torch.randn_like(module(x)[0])
    runs: dict[str, Callable[[], Any]] = {"forward": forward, "forward_backward": forward_backward(module, x, grad)}
    return runs if x.device.type == "cpu" else {**runs, "graphed": graphed(module, x, grad)}


def measure(modules: list[nn.Module], x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """The memory and times of modules, a row each."""
    results: list[dict[str, Any]] = [{"kept_bytes": kept_memory(module, x)} for module in modules]
    runs = [runs_of(module, x) for module in modules]
    for kind in runs[0]:
        for result, times in zip(results, timed([r[kind] for r in runs], x.device.type, seconds), strict=True):
            result[kind] = summary(times)
    return results


def summary(times: list[float]) -> dict[str, Any]:
    """Median and quartiles of milliseconds."""
    quartiles = statistics.quantiles(times, n=4)
    return {"median_ms": statistics.median(times), "quartiles_ms": [quartiles[0], quartiles[2]]}


def benchmark_shape(shape: tuple[int, int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """``nn.LSTM`` and each cell with each kernel at one shape.

    Raises:
        SystemExit: a cell's result is wrong.
    """
    steps, batch, m, d = shape
    dtype = getattr(torch, args.dtype)
    x = torch.randn(steps, batch, m, device=args.device, dtype=dtype, requires_grad=True)
    stack: dict[str, Any] = {"num_layers": args.layers, "bidirectional": args.bidirectional}
    modules: list[nn.Module] = [nn.LSTM(m, d, **stack, device=args.device, dtype=dtype)]
    about = {"shape": shape, "dtype": args.dtype, **stack}
    rows: list[dict[str, Any]] = [{**about, "cell": "nn.LSTM", "backend": "torch"}]
    for cell, kernel in itertools.product(args.cell, args.kernel):
        rkm = RKM(
            m, d, cell=cell, ngram=args.ngram, layer_norm=args.layer_norm, memory_clip=args.memory_clip,
            feedback=False if args.no_feedback else None, backend=args.backend, device=args.device, dtype=dtype,
            kernel=kernel, **stack,
        )  # fmt: skip
        rkm.wavefront = args.wavefront or stretches(rkm, x)  # the check's few steps have layers side by side, too
        error = error_of(rkm, x)
        rkm.wavefront = args.wavefront
        if not error <= TOLERANCES[dtype]:
            name = cell if kernel == "linear" else f"{cell} with the {kernel} kernel"
            raise SystemExit(f"benchmark: {name} at {shape} in {args.dtype} is wrong: off by {error:.1e}")
        modules.append(rkm)
        rows.append(
            {
                **about,
                "cell": cell,
                "backend": args.backend,
                "error": error,
                "feedback": rkm.feedback,
                "ngram": args.ngram,
            }
            | {"layer_norm": args.layer_norm, "memory_clip": args.memory_clip, "kernel": kernel}
        )
    measured = measure(modules, x, args.seconds)
    kinds = measured[0].keys() - {"kept_bytes"}
    for module, row, result in zip(modules, rows, measured, strict=True):
        row.update(result)
        if isinstance(module, RKM):
            row.update(stretches=stretches(module, x), graphed_stretches=stretches(module, x, recorded=True))
            row.update({f"{kind}_ratio": rows[0][kind]["median_ms"] / row[kind]["median_ms"] for kind in kinds})
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each row's speed relative to ``nn.LSTM`` into the file ``path``."""
    plt = pyplot()
    shown = [row for row in rows if "error" in row]
    names = [
        f"{row['cell']}{'' if row['feedback'] else ', no feedback'}, {row['dtype']}\n"
        + ", ".join(map(str, row["shape"]))
        for row in shown
    ]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.55 * len(shown)), layout="constrained")
    kinds = {"forward_backward_ratio": "as PyTorch runs it", "graphed_ratio": "as a CUDA graph"}
    for i, (kind, label) in enumerate(kinds.items()):
        if any(kind in row for row in shown):
            places = [at + 0.38 * i for at in range(len(shown))]
            bars = axes.barh(places, [row.get(kind, 0) for row in shown], 0.36, label=label)
            axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks([at + 0.19 for at in range(len(shown))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times nn.LSTM's speed, forward and backward (T, B, m, d)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| T, B, m, d | dtype | cell | forward ms | forward + backward ms (quartiles) | / nn.LSTM | as a CUDA graph ms "
        "| / nn.LSTM | kept MB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        both = row["forward_backward"]
        spread = "{:.3f}, {:.3f}".format(*both["quartiles_ms"])
        kept = "" if row["kept_bytes"] is None else f"{row['kept_bytes'] / 1e6:.1f}"
        ratios = [f"{row[k]:.2f}" if k in row else "" for k in ("forward_backward_ratio", "graphed_ratio")]
        graph = f"{row['graphed']['median_ms']:.3f}" if "graphed" in row else ""
        name = row["cell"] + ("" if row.get("feedback", True) else " without feedback")
        name += "" if row.get("kernel", "linear") == "linear" else f", {row['kernel']} kernel"
        name += "" if row.get("num_layers", 1) == 1 else f", {row['num_layers']} layers"
        name += ", both directions" if row.get("bidirectional") else ""
        numbers = {row.get("stretches", 1), row.get("graphed_stretches", 1)}
        name += f", side by side over {max(numbers)} stretches" if numbers != {1} else ""
        lines.append(
            f"| {', '.join(map(str, row['shape']))} | {row['dtype']} | {name} | {row['forward']['median_ms']:.3f} | "
            f"{both['median_ms']:.3f} ({spread}) | {ratios[0]} | {graph} | {ratios[1]} | {kept} |"
        )
    return "\n".join(lines)


def shape_of(text: str) -> tuple[int, ...]:
    """Read a shape T,B,m,d: ``"70,20,1150,1150"`` is ``(70, 20, 1150, 1150)``."""
    numbers = tuple(int(field) for field in text.split(","))
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a shape is T,B,m,d, four positive numbers, not {text!r}")
    return numbers


def recurrence(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``recurrence``: measure all cells at all shapes, and print the table."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmark: no CUDA device here; use --device cpu")
    if args.device == "cpu" and args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
    rows = []
    for shape in args.shape:
        try:
            rows += benchmark_shape(shape, args)
        except RKMError as error:
            raise SystemExit(f"benchmark: {error}") from error
        print(table(rows[-1 - len(args.cell) * len(args.kernel) :]), flush=True)
    return rows
