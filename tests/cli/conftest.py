"""fairseq's own commands, run as a user runs them, on a small corpus."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASK = ["--user-dir", "fairseq_rkm", "--task", "stateful_language_modeling"]
SMALL = [
    *TASK, "--arch", "rkm_lm", "--decoder-embed-dim", "8", "--decoder-hidden-size", "12", "--decoder-layers", "2",
    "--share-decoder-input-output-embed", "--batch-size", "4", "--tokens-per-sample", "7", "--optimizer", "adam",
    "--lr", "0.02", "--clip-norm", "1", "--cpu", "--num-workers", "0", "--log-format", "json", "--log-interval", "1",
    "--no-epoch-checkpoints",
]  # fmt: skip


def pytest_itemcollected(item):
    """Pytest asks this for the tests of this folder alone."""
    item.add_marker(pytest.mark.cli)


def hydra_flags(data: Path, folder: Path) -> list[object]:
    """Of fairseq-hydra-train for three updates of a small model on a CPU, with all that it writes in a folder."""
    (folder / "small.yaml").write_text(
        f"""# @package _group_
common: {{user_dir: {ROOT / "fairseq_rkm"}, cpu: true, log_format: json, log_interval: 1}}
task: {{_name: stateful_language_modeling, data: {data}, tokens_per_sample: 7}}
model: {{_name: rkm_lm, cell: rkm_lstm, decoder_embed_dim: 8, decoder_hidden_size: 8, ngram: 2}}
criterion: {{_name: cross_entropy}}
optimizer: {{_name: nt_asgd}}
lr_scheduler: {{_name: fixed}}
dataset: {{batch_size: 4, num_workers: 0}}
optimization: {{max_update: 3, lr: [0.01]}}
checkpoint: {{save_dir: {folder / "run"}, no_save: true}}
distributed_training: {{distributed_world_size: 1}}
"""
    )
    return ["--config-dir", folder, "--config-name", "small", f"hydra.run.dir={folder / 'out'}"]


@dataclass
class Result:
    """What a command left."""

    status: int
    output: str

    def entries(self, kind: str) -> list[dict]:
        """The JSON of all log lines of a kind: train_inner, train or valid."""
        return [json.loads(found) for found in re.findall(rf"\| {kind} \| (\{{.*\}})", self.output)]

    @property
    def error(self) -> str:
        """The message of the user's mistake that ended the command."""
        assert self.status != 0, self.output[-3000:]
        assert "Traceback" not in self.output, self.output[-3000:]
        return re.search(r"^fairseq-rkm: error: (.*)$", self.output, re.M)[1]


def start(command: str, *args: object, gpus: int = 1, **environment: str) -> subprocess.Popen:
    """Start a fairseq command in the repository's root; it sees so many GPUs, if there are any: fairseq takes all.

    A command that ends in ``.py`` is a script of the tests; one of the plugin has its module's whole name.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    visible = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[:gpus])
    module = command if command.startswith("fairseq_rkm.") else f"fairseq_cli.{command}"
    program = [ROOT / "tests" / command] if command.endswith(".py") else ["-m", module]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> Result:
    """Wait for it."""
    output, _ = process.communicate(timeout=300)
    return Result(process.returncode, output)


def fairseq(command: str, *args: object, gpus: int = 1) -> Result:
    """Run a fairseq command to its end, whatever that is."""
    return finish(start(command, *args, gpus=gpus))


def succeed(command: str, *args: object, gpus: int = 1) -> Result:
    """Run one that must succeed."""
    result = fairseq(command, *args, gpus=gpus)
    assert result.status == 0, result.output[-5000:]
    return result


def write_text(folder: Path, words: int = 30, lines: int = 300, seed: int = 0) -> Path:
    """train.txt, valid.txt and test.txt of a language in which a word largely tells the next."""
    draw = random.Random(seed)
    for split, count in (("train", lines), ("valid", 12), ("test", 9)):
        sentences = []
        for _ in range(count):
            at, sentence = draw.randrange(words), []
            for _ in range(draw.randrange(2, 12)):
                at = (3 * at + draw.choice([1, 1, 1, 2])) % words
                sentence.append(f"w{at}")
            sentences.append(" ".join(sentence))
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n")
    return folder


def preprocess(text: Path, data: Path, *args: object) -> Path:
    """fairseq-preprocess for a language model."""
    prefixes = [item for split in ("train", "valid", "test") for item in (f"--{split}pref", text / f"{split}.txt")]
    succeed("preprocess", "--only-source", *prefixes, "--destdir", data, "--padding-factor", 1, *args)
    return data


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def data(text, tmp_path_factory) -> Path:
    return preprocess(text, tmp_path_factory.mktemp("data") / "bin")


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory) -> tuple[Path, Result]:
    """A run of two epochs and its output."""
    run = tmp_path_factory.mktemp("run")
    result = succeed("train", data, *SMALL, "--ngram", 2, "--max-epoch", 2, "--save-dir", run)
    return run, result
