"""Train in two processes with every precision, every way to average gradients and CUDA graphs, and tell which can.

    python scripts/flag_combinations.py --processes 2 --jobs 8 --json combinations.json
    python scripts/flag_combinations.py --device cpu --models rkm_lm --precisions "--fp16 --amp"

A small ``rkm_lm`` and a small ``rkm`` learn a text in which each word tells the next, or its translation. A combination
``trains`` if the loss falls by a tenth or more, to a finite number. If it is refused in a sentence, the table has a
number, and the sentence follows below. ``fails`` stands for a stack trace or no end within ``--seconds``, which is a
fault. ``--jobs`` runs go on at the same time: they share the GPUs, and each has a port and a folder of its own. Further
flags are fairseq-train's.
"""

import argparse
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fairseq_rkm.experiments.circumstances import PLUGIN, circumstances, portable
from fairseq_rkm.experiments.command_pool import Ended, free_ports, run_commands
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.sweep_benchmark import count
from fairseq_rkm.experiments.task_pool import share_processors

PRECISIONS = ("float32", "--bf16", "--fp16", "--memory-efficient-bf16", "--memory-efficient-fp16", "--amp")
BACKENDS = ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d", "fully_sharded")
DIFFERENT = ("legacy_ddp", "pytorch_ddp", "fully_sharded")
"""The backends of which none is another name of another."""
MODELS = {
    "rkm_lm": [
        "--task", "stateful_language_modeling", "--arch", "rkm_lm", "--decoder-embed-dim", "16",
        "--decoder-hidden-size", "24", "--share-decoder-input-output-embed", "--tokens-per-sample", "7",
    ],
    "rkm": ["--task", "translation", "--source-lang", "xx", "--target-lang", "yy", "--arch", "rkm_tiny"],
}  # fmt: skip
"""Flags of each model."""
COMMON = [
    "--user-dir", str(PLUGIN), "--optimizer", "adam", "--lr", "0.03", "--clip-norm", "1", "--batch-size", "8",
    "--required-batch-size-multiple", "1", "--num-workers", "0", "--no-save", "--disable-validation",
    "--log-format", "json", "--log-interval", "1", "--fp16-init-scale", "16", "--heartbeat-timeout", "120",
]  # fmt: skip
"""Flags of all runs. Flags of the command line come after them."""


class Combination(NamedTuple):
    """Flags of a run, by their place in the table."""

    model: str
    precision: str
    backend: str
    graphs: bool


def main() -> None:
    """Command line."""
    args = parse()
    try:
        outcomes = try_all(args)
    except KeyboardInterrupt:
        print("interrupted: all runs were stopped", file=sys.stderr)
        sys.exit(130)
    about = circumstances()
    print(f"\n{markdown(outcomes)}")
    where = "CPU processes" if args.device == "cpu" else "GPUs"
    print(f"\n{args.processes} {where} ({about['hardware']}), torch {about['torch']}, commit {about['commit']}.")


def try_all(args: argparse.Namespace) -> dict[Combination, str]:
    """Run all combinations, with a line and an entry of the JSON file as each ends; their outcomes, in order."""
    chosen = list(combinations(args))
    found: dict[Combination, dict[str, Any]] = {}
    about = {"command": portable(["python", *sys.argv]), **circumstances()} if args.json else {}

    def tell(number: int, ended: Ended) -> None:
        combination, outcome = chosen[number], outcome_of(*ended[:2], args.seconds)
        found[combination] = {**combination._asdict(), "outcome": outcome, "seconds": round(ended.seconds, 1)}
        if outcome.startswith("fails"):
            found[combination]["output"] = ended.output[-3000:]
        words = f"{' '.join(flags_of(combination))}: {outcome}, {ended.seconds:.0f} s"
        print(f"[{len(found)}/{len(chosen)}] {words}", flush=True)
        if args.json:
            write_json(args.json, {**about, "runs": [found[one] for one in chosen if one in found]})

    share_processors(args.jobs * args.processes)
    apart_from_launchers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        commands = [
            command(folder, folder / f"run{number}", combination, port, args)
            for (number, combination), port in zip(enumerate(chosen), free_ports(), strict=False)
        ]
        run_commands(commands, folder, args.jobs, args.seconds, tell)
    return {combination: found[combination]["outcome"] for combination in chosen}


def apart_from_launchers() -> None:
    """Let fairseq start the processes of each run by itself, also in a job of torchrun or SLURM."""
    for name in list(os.environ):
        if name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") or name.startswith("SLURM_"):
            del os.environ[name]


def parse() -> argparse.Namespace:
    """Read the command line; ``flags`` holds the flags for fairseq."""
    has_gpu = torch.cuda.is_available()
    # Names of flags are values here. Those that --precisions does not take are left for fairseq.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=count, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--precisions", default=" ".join(PRECISIONS), help="in one argument, separated by spaces")
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=list(DIFFERENT))
    parser.add_argument("--updates", type=count, default=60)
    parser.add_argument("--jobs", type=count, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--seconds", type=count, default=180, help="a run's time until it is killed (default: 180)")
    parser.add_argument("--json", type=Path, help="where to keep the outcomes, as they come")
    args, rest = parser.parse_known_args()
    args.flags = rest
    unknown = set(args.precisions.split()) - set(PRECISIONS)
    if unknown:
        parser.error(f"--precisions is of {', '.join(PRECISIONS)}, not {', '.join(sorted(unknown))}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def combinations(args: argparse.Namespace) -> Iterable[Combination]:
    """All asked combinations; on GPUs each without CUDA graphs and with them."""
    for model in args.models:
        for precision in args.precisions.split():
            for backend in args.backends:
                for graphs in (False, True) if args.device == "cuda" else (False,):
                    yield Combination(model, precision, backend, graphs)


def flags_of(combination: Combination) -> list[str]:
    """The flags that make a combination."""
    precision = [] if combination.precision == "float32" else [combination.precision]
    graphs = ["--cuda-graphs"] if combination.graphs else []
    return [combination.model, *precision, "--ddp-backend", combination.backend, *graphs]


def command(data: Path, run: Path, combination: Combination, port: int, args: argparse.Namespace) -> list[str]:
    """The command that trains in a run's folder, with processes that meet at a port."""
    model, *chosen = flags_of(combination)
    return [
        sys.executable, "-m", "fairseq_cli.train", str(data), *COMMON, *MODELS[model], *chosen,
        "--max-update", str(args.updates), "--save-dir", str(run), *args.flags, "--distributed-port", str(port),
        "--distributed-world-size", str(args.processes), *(["--cpu"] if args.device == "cpu" else []),
    ]  # fmt: skip


def outcome_of(status: int | None, output: str, seconds: float) -> str:
    """``trains``, a sentence of refusal, or ``fails`` and a reason; a status of None is a run killed after so long."""
    if status is None:
        return f"fails: no end within {seconds:g} s"
    refusal = re.search(r"fairseq-rkm: error: (.*)", output)
    if status:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        return refusal[1] if refusal and "Traceback" not in output else f"fails: {last}"
    losses = [float(entry["loss"]) for entry in entries(output.splitlines(), "train_inner")]
    fallen = len(losses) > 1 and math.isfinite(losses[-1]) and losses[-1] < 0.9 * losses[0]
    return "trains" if fallen else f"fails: the losses are {losses[:1]} to {losses[-1:]}"


def markdown(outcomes: dict[Combination, str]) -> str:
    """A table of all outcomes, with numbers for sentences, and the sentences."""
    sentences: dict[str, int] = {}

    def short(outcome: str) -> str:
        if outcome == "trains":
            return outcome
        number = sentences.setdefault(outcome, len(sentences) + 1)
        return f"fails ({number})" if outcome.startswith("fails") else f"({number})"

    backends = list(dict.fromkeys(combination.backend for combination in outcomes))
    lines = [
        f"| model | precision | graphs | {' | '.join(f'`{backend}`' for backend in backends)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in backends)} |",
    ]
    for model, precision, graphs in dict.fromkeys((c.model, c.precision, c.graphs) for c in outcomes):
        found = (short(outcomes[Combination(model, precision, backend, graphs)]) for backend in backends)
        lines.append(f"| `{model}` | {precision} | {'yes' if graphs else 'no'} | {' | '.join(found)} |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}" for sentence, number in sentences.items())])


def make_data(folder: Path) -> None:
    """Write a language of 20 words as streams, and pairs of sentences of which one is the other reversed."""
    import fairseq_rkm.quiet_import  # isort: skip  # noqa: F401  before anything that imports fairseq
    import numpy as np
    from fairseq.data import Dictionary
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    words = Dictionary()
    for number in range(20):
        words.add_symbol(f"w{number}")
    generator = torch.Generator().manual_seed(1)
    sentences = []
    for _ in range(600):
        first, length = (int(torch.randint(1, most, (), generator=generator)) for most in (20, 7))
        numbers = [words.nspecial + (first + 3 * i) % 20 for i in range(length)]
        sentences.append((torch.tensor([*numbers, words.eos()]), torch.tensor([*numbers[::-1], words.eos()])))
    for name, side in (("train", 0), ("train.xx-yy.xx", 0), ("train.xx-yy.yy", 1)):
        builder = MMapIndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.int32)
        for sentence in sentences:
            builder.add_item(sentence[side])
        builder.finalize(str(folder / f"{name}.idx"))
    for name in ("dict.txt", "dict.xx.txt", "dict.yy.txt"):
        words.save(str(folder / name))
