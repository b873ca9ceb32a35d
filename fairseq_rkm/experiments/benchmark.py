"""Check that recurrences are right, then time them against ``torch.nn.LSTM`` in the same run.

    python scripts/benchmark.py recurrence --device cuda --dtype bfloat16 --cell rkm_lstm --shape 70,20,1150,1150
    python scripts/benchmark.py sweep --minutes 20 --json sweep.json --plot sweep.png
    python scripts/benchmark.py train DATA --user-dir fairseq_rkm --task stateful_language_modeling --arch rkm_lm ...
    python scripts/benchmark.py corpus --tokens 1000000000 --processes 2
    python scripts/benchmark.py derivatives --device cpu --shape 35,20,200,200
    python scripts/benchmark.py scaling --gpus 1 2 4 8 --batch 80 20 --json scaling.json --plot scaling.png

The first command prints, for each shape T,B,m,d, the milliseconds (median and quartiles) of the forward pass and of
forward and backward. It prints the memory that a forward pass keeps for the backward pass, and the speed relative to
``nn.LSTM`` (cuDNN, oneDNN) of the same sizes and dtype: above 1 is faster. On a GPU, forward and backward are timed
twice: as PyTorch runs them, and as a CUDA graph, without the host's time to launch. A wrong result is an error, not a
row.

The second command does so for a grid of sizes, batches and precisions, with feedback and without, and prints tables. It
begins with the most telling fields, keeps each result in the JSON file, and goes on from there when given again. Memory
that runs out, a refusal or a wrong result is told in its field. The picture shows ratios and backends as heat maps.

The third command prints the tokens per second of whole updates. The fourth makes a corpus and prints how long a
language model's data takes to open and to read, and how much memory that takes. The fifth prints what derivatives of
higher order and gradients of each sample cost.

The sixth trains a language model on each number of GPUs that the machine has, with CUDA graphs and without. It prints
and draws tokens per second, their ratio to one GPU's, and the parts of an update's time: the passes, the reduction of
gradients and numbers over processes, the optimizer, and the host. Further flags are fairseq-train's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fairseq_rkm import CELLS, RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.experiments.derivatives_benchmark import derivatives
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.experiments.recurrence_benchmark import plot, recurrence, shape_of
from fairseq_rkm.experiments.result_files import pyplot
from fairseq_rkm.experiments.sweep_benchmark import add_flags, count
from fairseq_rkm.ops.kernel_functions import KERNELS


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``train``: time whole updates of fairseq-train, and print the speed.

    Returns:
        One row: the flags, and the median and quartiles of tokens per second.

    Raises:
        SystemExit: fairseq fails; the message shows the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "fairseq_cli.train", *args.flags, "--log-format", "json", "--log-interval", "10",
            "--max-update", str(args.updates), "--no-save", "--disable-validation", "--save-dir", folder,
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    speeds = sorted(float(entry["wps"]) for entry in entries(output.splitlines(), "train_inner")[2:])
    if result.returncode or not speeds:
        raise SystemExit(f"benchmark: fairseq-train failed or was too short:\n{output[-2000:]}")
    quartiles = statistics.quantiles(speeds, n=4)
    print(f"{statistics.median(speeds):,.0f} tokens/s (quartiles {quartiles[0]:,.0f}, {quartiles[2]:,.0f})")
    return [{"flags": args.flags, "tokens_per_second": statistics.median(speeds), "quartiles": quartiles}]


def corpus(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``corpus``; it alone needs fairseq, which a machine for measuring kernels may lack."""
    import fairseq_rkm.quiet_import  # isort: skip  # noqa: F401  before anything that imports fairseq
    from fairseq_rkm.experiments.corpus_benchmark import corpus as measure

    return measure(args)


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``scaling``; it needs fairseq as ``corpus`` does."""
    import fairseq_rkm.quiet_import  # isort: skip  # noqa: F401  before anything that imports fairseq
    from fairseq_rkm.experiments.scaling_benchmark import scaling as measure

    return measure(args)


def main() -> None:
    """Command line."""
    args = parse()
    if args.plot:
        try:
            pyplot()  # before minutes of measuring
        except RKMError as error:
            raise SystemExit(f"benchmark: {error}") from error
    rows = args.run(args)
    if args.keeps_rows:
        return
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        earlier = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([*earlier, *({**row, **circumstances()} for row in rows)], indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line; ``flags`` holds the flags of ``train`` and ``scaling`` for fairseq."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("recurrence", help="one layer against nn.LSTM")
    one.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="float32: with TF32"
    )
    one.add_argument("--cell", choices=list(CELLS), nargs="+", default=["rkm_lstm"])
    one.add_argument(
        "--kernel", choices=list(KERNELS), nargs="+", default=["linear"], help="the candidates' (default: linear)"
    )
    one.add_argument("--shape", type=shape_of, nargs="+", required=True, metavar="T,B,m,d")
    one.add_argument("--backend", default="auto")
    one.add_argument("--ngram", type=int, default=1)
    one.add_argument("--layer-norm", action="store_true")
    one.add_argument("--memory-clip", type=float)
    one.add_argument("--no-feedback", action="store_true")
    one.add_argument("--layers", type=count, default=1)
    one.add_argument("--bidirectional", action="store_true")
    one.add_argument(
        "--wavefront", type=count, metavar="N",
        help="run small layers of a stack side by side over N stretches of time; 1: in order (default: an estimate's)",
    )  # fmt: skip
    one.add_argument("--threads", type=int, help="CPU threads")
    one.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each measurement")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--json", type=Path, help="where to append the rows, with hardware, versions and commit")
    one.add_argument("--plot", type=Path, help="where to draw the ratios")
    one.set_defaults(run=recurrence, keeps_rows=False)
    add_flags(commands.add_parser("sweep", help="a grid of sizes against nn.LSTM"))
    two = commands.add_parser("train", help="whole updates of fairseq-train: its flags follow")
    two.add_argument("--updates", type=int, default=200)
    two.add_argument("--json", type=Path, help="where to append the result, with hardware, versions and commit")
    two.set_defaults(run=train, plot=None, keeps_rows=False)
    three = commands.add_parser("corpus", help="how a large text is opened and read")
    three.add_argument("--tokens", type=int, default=1_000_000_000)
    three.add_argument("--processes", type=int, default=1)
    three.add_argument("--batch-size", type=int, default=80, help="streams of each process")
    three.add_argument("--tokens-per-sample", type=int, default=70)
    three.add_argument("--batches", type=int, default=1000, help="batches to read")
    three.add_argument("--folder", type=Path, help="where to make the corpus, which is removed at the end")
    three.add_argument("--json", type=Path, help="where to append the rows, with hardware, versions and commit")
    three.set_defaults(run=corpus, plot=None, keeps_rows=False)
    four = commands.add_parser("derivatives", help="derivatives of higher order, and gradients of each sample")
    four.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    four.add_argument("--cell", choices=list(CELLS), default="rkm_lstm")
    four.add_argument("--shape", type=shape_of, nargs="+", required=True, metavar="T,B,m,d")
    four.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each measurement")
    four.add_argument("--seed", type=int, default=1)
    four.add_argument("--json", type=Path, help="where to append the rows, with hardware, versions and commit")
    four.set_defaults(run=derivatives, plot=None, keeps_rows=False)
    add_scaling_flags(commands.add_parser("scaling", help="a language model's training on several GPUs"))
    args, rest = parser.parse_known_args()
    if rest and args.run not in (train, scaling):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    args.flags = rest
    return args


def add_scaling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the subcommand ``scaling``."""
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--gpus", type=count, nargs="+", default=[1, 2, 4, 8], metavar="N", help="or CPU processes")
    parser.add_argument("--batch", type=count, nargs="+", default=[80, 20], metavar="B", help="streams of each GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16" if has_gpu else "float32")
    parser.add_argument("--updates", type=count, default=200)
    parser.add_argument("--tokens-per-sample", type=count, default=70)
    parser.add_argument("--words", type=count, default=10_000, help="words of the random text, at most 65,000")
    parser.add_argument("--json", type=Path, help="where to append the rows as they come")
    parser.add_argument("--plot", type=Path, help="where to draw speeds and parts")
    parser.set_defaults(run=scaling, keeps_rows=True)


if __name__ == "__main__":
    main()
