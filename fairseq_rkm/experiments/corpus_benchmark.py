"""Make a corpus of any number of tokens, and measure how a language model's training reads it."""

import argparse
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
from fairseq.data import Dictionary
from omegaconf import OmegaConf

import fairseq_rkm
from fairseq_rkm.tasks.stateful_language_modeling import StatefulLanguageModelingConfig, StatefulLanguageModelingTask

TYPES_MADE = 50_000
"""Words of the made language."""
LONGEST_MADE = 49
"""The most tokens of a sentence."""
MADE_AT_ONCE = 1 << 24
"""Tokens that are made at a time."""


def corpus(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The subcommand ``corpus``: make a corpus, and let processes of their own read batches of it, as ranks do.

    Returns:
        A row a process: the seconds to open the split and to the first batch, microseconds a batch, and the growth of
        its resident memory in MiB, at the end and at most.

    Raises:
        SystemExit: a process fails; it has said why.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_corpus(Path(folder), args.tokens)
        shape = [args.batch_size, args.tokens_per_sample, args.batches]
        command = [sys.executable, "-m", "fairseq_rkm.experiments.corpus_benchmark", folder, *map(str, shape)]
        ranks = [
            Popen([*command, str(args.processes), str(rank)], stdout=PIPE, text=True) for rank in range(args.processes)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("benchmark: a process that reads the corpus failed")
    rows = []
    print("| process | tokens | open (s) | first batch (s) | a batch (us) | memory (MiB) | at most |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rank, output in enumerate(outputs):
        opened, first, batch, memory, peak = map(float, output.split())
        print(f"| {rank} | {args.tokens:,} | {opened:.2f} | {first:.2f} | {batch:.0f} | {memory:.0f} | {peak:.0f} |")
        rows.append({
            "rank": rank, "tokens": args.tokens, "open_s": opened, "first_batch_s": first, "batch_us": batch,
            "memory_mib": memory, "peak_mib": peak,
        })  # fmt: skip
    return rows


def make_corpus(folder: Path, tokens: int, types: int = TYPES_MADE) -> None:
    """Write a dictionary and a training split of random words, as fairseq-preprocess writes them.

    Args:
        folder: an existing folder.
        tokens: in sentences of 1 to :data:`LONGEST_MADE` tokens. After :data:`MADE_AT_ONCE` the text repeats itself.
        types: words of the language, at most 65,000, as their numbers are stored in 16 bits.
    """
    draw = np.random.default_rng(1)
    dictionary = Dictionary()
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(types)))
    ends = np.cumsum(draw.integers(1, LONGEST_MADE + 1, MADE_AT_ONCE), dtype=np.int64)
    ends = np.append(ends[ends < MADE_AT_ONCE], MADE_AT_ONCE)
    text = draw.integers(dictionary.nspecial, dictionary.nspecial + types, MADE_AT_ONCE).astype("<u2")
    text[ends - 1] = dictionary.eos()
    starts = []
    with open(folder / "train.bin", "wb") as file:
        for first in range(0, tokens, MADE_AT_ONCE):
            length = min(MADE_AT_ONCE, tokens - first)
            text[:length].tofile(file)
            starts.append(first + np.append(0, ends[ends < length]))
    places = np.concatenate(starts)
    with open(folder / "train.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQ", 1, 8, len(places)))
        np.diff(places, append=tokens).astype("<i4").tofile(file)
        (places * 2).astype("<i8").tofile(file)


def read(folder: str, batch_size: int, tokens_per_sample: int, batches: int, processes: int, rank: int) -> list[float]:
    """Read batches as a rank of a training run does.

    Returns:
        The seconds to open the split and to the first batch, microseconds a batch, and the growth of resident memory
        in MiB, at the end and at most.
    """
    flags = StatefulLanguageModelingConfig(
        data=folder, tokens_per_sample=tokens_per_sample, batch_size=batch_size, batch_size_valid=batch_size,
        train_subset="train", dataset_impl=None, update_freq=[1], distributed_world_size=processes,
    )  # fmt: skip
    task = StatefulLanguageModelingTask.setup_task(OmegaConf.structured(flags))
    before, start = memory("VmRSS"), time.perf_counter()
    task.load_dataset("train", combine=True)
    opened = time.perf_counter()
    segments = task.get_batch_iterator(
        task.dataset("train"), max_sentences=batch_size, num_shards=processes, shard_id=rank
    ).next_epoch_itr(shuffle=False)
    next(segments)
    first = time.perf_counter()
    count = sum(1 for _ in zip(range(batches), segments, strict=False))
    ended = time.perf_counter()
    grown = [memory("VmRSS") - before, memory("VmHWM") - before]
    return [opened - start, first - start, 1e6 * (ended - first) / max(count, 1), *grown]


def memory(name: str) -> float:
    """Return an entry of this process's status in MiB: ``VmRSS``, its resident memory, or ``VmHWM``, the most of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def main() -> None:
    """Read in a process of its own: folder, batch size, tokens of a segment, batches, processes, rank."""
    fairseq_rkm.register()
    folder, *numbers = sys.argv[1:]
    print(*read(folder, *map(int, numbers)))


if __name__ == "__main__":
    os.environ.setdefault("LOGLEVEL", "WARNING")
    main()
