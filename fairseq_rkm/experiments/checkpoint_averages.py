"""Average the weights of a run's last checkpoints: the average is often better than each, and as fast.

    python scripts/average_checkpoints.py RUN --last 10 --out RUN/average.pt
    python scripts/average_checkpoints.py A.pt B.pt --out average.pt

RUN is a folder with fairseq's checkpoint1.pt, checkpoint2.pt, ... (one an epoch).
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch


def last_checkpoints(folder: Path, count: int) -> list[Path]:
    """The checkpoints of a folder's last ``count`` epochs, the oldest first.

    Raises:
        SystemExit: the folder has none.
    """
    epochs = {
        int(m[1]): path for path in folder.glob("checkpoint*.pt") if (m := re.fullmatch(r"\D+(\d+)\.pt", path.name))
    }
    if not epochs:
        raise SystemExit(f"average_checkpoints: no checkpoint1.pt, checkpoint2.pt, ... in {folder}")
    return [epochs[epoch] for epoch in sorted(epochs)[-count:]]


def average(paths: list[Path]) -> dict[str, Any]:
    """Average checkpoints, and return the last one with the mean weights and without its optimizer.

    Weights that are no floating-point numbers stay the last one's. Sums run in float64: neither order nor number of the
    checkpoints then shows in the rounding.

    Raises:
        SystemExit: the checkpoints are of different models, or cannot be read.
    """
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        state = _read(path)
        shapes = {name: tensor.shape for name, tensor in state["model"].items()}
        if total and shapes != {name: tensor.shape for name, tensor in total.items()}:
            raise SystemExit(f"average_checkpoints: {path} is of another model than {paths[0]}")
        for name, tensor in state["model"].items():
            if not tensor.is_floating_point():
                total[name] = tensor
            else:
                total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + tensor.double()
    for name, tensor in state["model"].items():
        state["model"][name] = (total[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
    state.pop("last_optimizer_state", None)
    return state


def _read(path: Path) -> dict[str, Any]:
    from fairseq_rkm import checkpoints

    try:
        state: dict[str, Any] = checkpoints.load(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"average_checkpoints: {error}") from error
    return state


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a file already there is replaced only by the whole new one."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="a run's folder, or checkpoints")
    parser.add_argument("--last", type=int, default=10, help="of a folder, the number of epochs (default 10)")
    parser.add_argument("--out", type=Path, required=True, help="where the average goes")
    args = parser.parse_args()
    paths = args.checkpoints
    if len(paths) == 1 and paths[0].is_dir():
        paths = last_checkpoints(paths[0], args.last)
    save(average(paths), args.out)
    print(f"{args.out}: the average of {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    main()
