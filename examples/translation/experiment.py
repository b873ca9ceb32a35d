"""Train translation models, average their last checkpoints, translate the test sets and score them with sacrebleu.

    python examples/translation/experiment.py DATA --out OUT --models rkm_lstm
    python examples/translation/experiment.py DATA --out OUT --models all --seeds 1 2 3 --jobs 4 --time-limit 9
    python examples/translation/experiment.py DATA --out OUT --models all --speed      after the above

DATA is what prepare.py wrote. Every model has the same data, vocabulary and time: at most --minutes of training, or
until the validation loss has not improved for --patience epochs. Of the best checkpoint and the average of the last
--average ones, the better on the validation set (BLEU) translates the test sets. OUT/MODEL-SEED gets model.pt with all
that RKMModel.from_pretrained needs, the logs, the translations and result.json.

What is done is not done again: the same command goes on where it was stopped. --jobs models are trained at once, spread
over the GPUs that there are; --speed then measures tokens/s and sentences/s one model at a time, into
OUT/MODEL-SEED/speed.json.
"""

import argparse
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sacrebleu
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from average_checkpoints import average, last_checkpoints, save
from report import circumstances, parse_line, write_json

ROOT = Path(__file__).resolve().parents[2]

COMMON = (
    "--task translation --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --optimizer adam "
    "--adam-betas (0.9,0.98) --lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --weight-decay 1e-4 --clip-norm 1 "
    "--batch-size 256 --num-workers 0 --log-format json --log-interval 20 --share-all-embeddings --dropout 0.3 "
    "--seed {seed} --tokenizer moses --bpe sentencepiece"
)
RKM = "--arch rkm_iwslt_de_en --user-dir {plugin} --lr 2e-3 --warmup-updates 400"
MODELS = {
    "rkm_lstm": f"{RKM} --cell rkm_lstm",
    "rkm_cifg": f"{RKM} --cell rkm_cifg",
    "lstm": f"{RKM} --cell lstm",
    "linear_kernel_gated": f"{RKM} --cell linear_kernel_gated",
    # Which default is better: attention below the last layer, after it, or after it and fed back; and what n-grams do.
    "rkm_lstm_attention_last": f"{RKM} --cell rkm_lstm --attention-layer 0",
    "rkm_lstm_input_feeding": f"{RKM} --cell rkm_lstm --attention-layer 0 --input-feeding",
    "rkm_lstm_1gram": f"{RKM} --cell rkm_lstm --encoder-ngram 1",
    # fairseq's own, of the same sizes, and its transformer at one that suits a corpus of this size.
    "fairseq_lstm": "--arch lstm --encoder-embed-dim 256 --encoder-hidden-size 256 --encoder-layers 2 "
    "--encoder-bidirectional --decoder-embed-dim 256 --decoder-hidden-size 512 --decoder-layers 2 "
    "--decoder-out-embed-dim 256 --lr 2e-3 --warmup-updates 400",
    "fairseq_transformer": "--arch transformer --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-layers 4 "
    "--encoder-attention-heads 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-layers 4 "
    "--decoder-attention-heads 4 --lr 5e-3 --warmup-updates 2000",
}
"""Flags of fairseq-train for each."""


class OutOfTimeError(Exception):
    """The time limit came before the work was done."""


@dataclass
class Bench:
    """What all runs share.

    Attributes:
        args: the command line.
        deadline: when to stop, by ``time.monotonic``.
        devices: GPUs' numbers, one entry for each job that may run at once.
        running: processes to be ended at the deadline.
    """

    args: argparse.Namespace
    deadline: float
    devices: "queue.Queue[int]" = field(default_factory=queue.Queue)
    running: set[subprocess.Popen] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        about = json.loads((self.args.data / "data.json").read_text(encoding="utf-8"))
        self.source, self.target = about["languages"]
        self.tests = {split: name for split, name in about["splits"].items() if split.startswith("test")}

    def fairseq(self, command: str, log: Path, device: int, *flags: object, append: bool = False) -> str:
        """Run a fairseq command, its output in a file; return the output.

        Raises:
            OutOfTimeError: the deadline came first.
            SystemExit: the command failed; with the end of what it said.
        """
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device), "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        with log.open("a" if append else "w", encoding="utf-8") as output:
            with self.lock:
                if time.monotonic() > self.deadline:
                    raise OutOfTimeError
                process = subprocess.Popen(
                    [sys.executable, "-m", f"fairseq_cli.{command}", str(self.args.data / "bin"), *map(str, flags)],
                    stdout=output, stderr=subprocess.STDOUT, env=environment,
                )  # fmt: skip
                self.running.add(process)
            process.wait()
            with self.lock:
                self.running.discard(process)
        if process.returncode:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"experiment: fairseq's {command} failed, see {log}:\n{end}")
        return log.read_text(encoding="utf-8")

    def stop(self) -> None:
        """End what runs; training goes on from its last checkpoint when it is started again."""
        with self.lock:
            self.deadline = time.monotonic()
            for process in self.running:
                process.send_signal(signal.SIGTERM)


@dataclass
class Run:
    """One model and seed."""

    bench: Bench
    model: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.bench.args.out / f"{self.model}-{self.seed}"

    def flags(self) -> list[str]:
        """fairseq-train's."""
        text = f"{COMMON} {MODELS[self.model]}".format(seed=self.seed, plugin=ROOT / "fairseq_rkm")
        text += f" --source-lang {self.bench.source} --target-lang {self.bench.target} {self.bench.args.train_flags}"
        cpu = [] if torch.cuda.is_available() else ["--cpu"]
        return [*text.split(), "--sentencepiece-model", str(self.pieces), *cpu]

    @property
    def pieces(self) -> Path:
        return self.bench.args.data / "sentencepiece.bpe.model"

    def measure(self, device: int) -> None:
        """Train, choose, translate, score; what is there already is kept."""
        if (self.folder / "result.json").is_file():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._train(device)
        valid, chosen = self._choose(device)
        model = self.folder / "model.pt"
        scores = {name: self._translate(device, model, split) for split, name in self.bench.tests.items()}
        write_json(self.folder / "result.json", self._result(valid, chosen, scores))
        for path in (*self.folder.glob("checkpoint*.pt"), self.folder / "average.pt"):
            path.unlink()

    def _train(self, device: int) -> None:
        done = self.folder / "trained"
        if done.is_file():
            return
        args = self.bench.args
        self.bench.fairseq(
            "train", self.folder / "train.log", device, *self.flags(), "--save-dir", self.folder, "--patience",
            args.patience, "--stop-time-hours", args.minutes / 60, "--keep-last-epochs", args.average, append=True,
        )  # fmt: skip
        done.touch()

    def _choose(self, device: int) -> tuple[dict[str, float], str]:
        """Make model.pt of the better of the best checkpoint and the average; BLEU on the validation set of both."""
        if not list(self.folder.glob("checkpoint[0-9]*.pt")):
            minutes = self.bench.args.minutes
            raise SystemExit(
                f"experiment: {self.folder.name} has no whole epoch after {minutes} minutes: give --minutes"
            )
        save(average(last_checkpoints(self.folder, self.bench.args.average)), self.folder / "average.pt")
        valid = {
            name: self._translate(device, self.folder / f"{name}.pt", "valid")["bleu"]
            for name in ("checkpoint_best", "average")
        }
        chosen = max(valid, key=lambda name: valid[name])
        shutil.copy(self.folder / f"{chosen}.pt", self.folder / "model.pt")
        shutil.copy(self.pieces, self.folder)
        for language in (self.bench.source, self.bench.target):
            shutil.copy(self.bench.args.data / "bin" / f"dict.{language}.txt", self.folder)
        return valid, chosen

    def _translate(self, device: int, checkpoint: Path, split: str) -> dict[str, Any]:
        """Translate a split: BLEU against the raw references, its signature, and sentences/s."""
        output = self.generate(device, checkpoint, split, self.folder / f"{split}.log")
        found = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.M))
        translations = [found[str(i)] for i in range(len(found))]
        (self.folder / f"{split}.txt").write_text("".join(line + "\n" for line in translations), encoding="utf-8")
        path = self.bench.args.data / "raw" / f"{split}.{self.bench.target}"
        references = path.read_text(encoding="utf-8").splitlines()
        if len(references) != len(translations):
            raise SystemExit(f"experiment: {len(translations)} translations of {len(references)} sentences of {split}")
        metric = sacrebleu.BLEU()
        score = metric.corpus_score(translations, [references]).score
        return {"bleu": score, "signature": str(metric.get_signature())}

    def generate(self, device: int, checkpoint: Path, split: str, log: Path) -> str:
        """fairseq-generate's output for a split."""
        plugin = ["--user-dir", ROOT / "fairseq_rkm"]
        cpu = [] if torch.cuda.is_available() else ["--cpu"]
        return self.bench.fairseq(
            "generate", log, device, *plugin, *cpu, "--task", "translation", "--source-lang", self.bench.source,
            "--target-lang", self.bench.target, "--path", checkpoint, "--gen-subset", split, "--batch-size", 128,
            "--beam", 5, "--max-len-a", 1.2, "--max-len-b", 10, "--required-batch-size-multiple", 1, "--tokenizer",
            "moses", "--bpe", "sentencepiece", "--sentencepiece-model", self.pieces, "--num-workers", 0,
        )  # fmt: skip

    def _result(self, valid: dict[str, float], chosen: str, scores: dict[str, Any]) -> dict[str, Any]:
        log = (self.folder / "train.log").read_text(encoding="utf-8")
        entries = [parse_line(line) for line in log.splitlines()]
        epochs = [entry for kind, entry in entries if kind == "train"]
        return {
            "model": self.model,
            "seed": self.seed,
            "languages": f"{self.bench.source}-{self.bench.target}",
            "parameters": int(re.search(r"num. shared model params: ([\d,]+)", log)[1].replace(",", "")),  # type: ignore[index]
            "bleu": {test: round(score["bleu"], 2) for test, score in scores.items()},
            "signature": next(iter(scores.values()))["signature"],
            "valid_bleu": {name: round(bleu, 2) for name, bleu in valid.items()},
            "chosen": chosen,
            "epochs": int(epochs[-1]["epoch"]),
            "updates": int(epochs[-1]["train_num_updates"]),
            "minutes": round(training_seconds(epochs) / 60, 2),
            "jobs_at_once": self.bench.args.jobs,
            "flags": " ".join(self.flags()),
            "circumstances": circumstances(),
        }

    def time(self, device: int) -> None:
        """Tokens/s in training and sentences/s in generation, alone on the machine."""
        path = self.folder / "speed.json"
        if path.is_file():
            return
        if not (self.folder / "model.pt").is_file():
            raise SystemExit(f"experiment: no {self.folder}/model.pt: train {self.model} first (without --speed)")
        log = self.bench.fairseq(
            "train", self.folder / "speed.log", device, *self.flags(), "--no-save", "--disable-validation",
            "--max-update", self.bench.args.speed_updates, "--save-dir", self.folder / "speed",
        )  # fmt: skip
        shutil.rmtree(self.folder / "speed", ignore_errors=True)
        entries = [entry for kind, entry in map(parse_line, log.splitlines()) if kind == "train_inner"]
        rates = [float(entry["wps"]) for entry in entries[len(entries) // 3 :]]
        output = [
            self.generate(device, self.folder / "model.pt", "test", self.folder / "speed_test.log") for _ in range(3)
        ]
        sentences = [float(re.search(r"\(([\d.]+) sentences/s", text)[1]) for text in output]  # type: ignore[index]
        figures = {
            "training_tokens_per_second": round(statistics.median(rates)),
            "generation_sentences_per_second": round(statistics.median(sentences), 1),
            "circumstances": circumstances(),
        }
        write_json(path, figures)


def training_seconds(epochs: list[dict[str, str]]) -> float:
    """Of all epochs together, whatever interruptions there were between them."""
    return sum(float(entry["train_train_wall"]) for entry in epochs)


def work(bench: Bench, runs: list[Run]) -> int:
    """Do all runs, ``--jobs`` at once; return how many are done."""
    done = 0

    def one(run: Run) -> bool:
        device = bench.devices.get()
        try:
            (run.time if bench.args.speed else run.measure)(device)
        except OutOfTimeError:
            return False
        finally:
            bench.devices.put(device)
        return True

    started = time.monotonic()
    with ThreadPoolExecutor(bench.args.jobs) as pool:
        pending = {pool.submit(one, run) for run in runs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=min(20, max(1, bench.deadline - time.monotonic())))
                done += sum(future.result() for future in finished)
                print(
                    f"{(time.monotonic() - started) / 60:5.1f} min  {done} of {len(runs)} done{_progress(runs)}",
                    flush=True,
                )
                if pending and time.monotonic() > bench.deadline:
                    bench.stop()
        except BaseException:
            bench.stop()
            raise
    return done


def _progress(runs: list[Run]) -> str:
    """Where the unfinished runs are."""
    states = []
    for run in runs:
        log = run.folder / "train.log"
        if (run.folder / "result.json").is_file() or not log.is_file():
            continue
        with log.open("rb") as content:
            content.seek(max(0, log.stat().st_size - 20_000))
            tail = content.read().decode(errors="replace").splitlines()
        valid = [entry for kind, entry in map(parse_line, tail) if kind == "valid"]
        if valid:
            states.append(f"{run.folder.name} epoch {valid[-1]['epoch']} valid ppl {valid[-1]['valid_ppl']}")
    return "".join(f"; {state}" for state in states)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--models", nargs="+", default=["rkm_lstm"], choices=["all", *MODELS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once")
    parser.add_argument("--minutes", type=float, default=10, help="of training at most, for each model (default 10)")
    parser.add_argument("--patience", type=int, default=10, help="epochs without improvement that end training (10)")
    parser.add_argument("--average", type=int, default=10, help="last checkpoints to average (10)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="minutes for this call; a next one goes on"
    )
    parser.add_argument("--train-flags", default="", help="more flags for fairseq-train, of all models")
    parser.add_argument("--speed", action="store_true", help="measure speeds of trained models, one at a time")
    parser.add_argument("--speed-updates", type=int, default=300, help="updates timed with --speed (300)")
    args = parser.parse_args()
    if not (args.data / "data.json").is_file():
        parser.error(f"{args.data} is not what prepare.py leaves when it has finished: run it first")
    if args.speed:
        args.jobs = 1
    if min(args.jobs, args.average, args.patience) < 1:
        parser.error("--jobs, --average and --patience must be at least 1")
    return args


def main() -> None:
    """Command line."""
    args = parse_arguments()
    bench = Bench(args, time.monotonic() + 60 * args.time_limit)
    gpus = max(1, torch.cuda.device_count())
    for job in range(args.jobs):
        bench.devices.put(job % gpus)
    models = list(MODELS) if "all" in args.models else args.models
    runs = [Run(bench, model, seed) for seed in args.seeds for model in models]
    done = work(bench, runs)
    if done < len(runs):
        print(f"out of time with {done} of {len(runs)} done: the same command goes on")


if __name__ == "__main__":
    main()
