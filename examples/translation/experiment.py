"""Train translation models, average their last checkpoints, translate the test sets and score them with sacrebleu.

    python examples/translation/experiment.py DATA --out OUT --models rkm_lstm
    python examples/translation/experiment.py DATA --out OUT --models all --seeds 1 2 3 --jobs 4 --time-limit 9
    python examples/translation/experiment.py DATA --out OUT --models all --speed      after the above

DATA is what prepare.py wrote. Every model has the same data, vocabulary and time: at most --minutes of training, or
until the validation loss has not improved for --patience epochs. Of the best checkpoint and the average of the last
--average ones, the better on the validation set (BLEU) translates the test sets. OUT/MODEL-SEED gets model.pt with all
that RKMModel.from_pretrained needs, the logs, the translations and result.json.

What is done is not done again: the same command goes on where it was stopped. --jobs models are trained at once, spread
over the GPUs that there are; --speed then measures tokens/s and sentences/s (of the training set's sentences on a GPU,
of the first test set's on a CPU) one model at a time, into OUT/MODEL-SEED/speed.json.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from parallel import Task, exit_if_failed, fairseq_command, gpus, hide_gpus, run_all

VISIBLE_GPUS = hide_gpus()

import fairseq_cli.generate
import fairseq_cli.train  # noqa: F401  before tasks are forked, so that none has to import them
import sacrebleu
import torch
from average_checkpoints import average, last_checkpoints, save
from report import circumstances, parse_line, portable, write_json

COMMON = (
    "--user-dir {plugin} --task translation --criterion label_smoothed_cross_entropy --label-smoothing 0.1 "
    # AdamW in one launch for all models alike, with no average.
    "--optimizer adamw_average --adam-betas (0.9,0.98) --weight-decay 0.05 --clip-norm 1 "
    "--lr-scheduler inverse_sqrt --warmup-init-lr 1e-7 --batch-size 256 --log-format json --log-interval 20 "
    "--share-all-embeddings --seed {seed} --tokenizer moses --bpe sentencepiece"
)
# Batches are put together beside training, which keeps a GPU waiting otherwise.
ON_GPU, ON_CPU = "--num-workers 2", "--num-workers 0 --cpu"
RKM_IN_STEPS = "--arch rkm_iwslt_de_en --lr 3e-3 --warmup-updates 400"
RKM = f"{RKM_IN_STEPS} {{graphs}}"
MODELS = {
    "rkm_lstm": f"{RKM} --cell rkm_lstm",
    "rkm_cifg": f"{RKM} --cell rkm_cifg",
    "lstm": f"{RKM} --cell lstm",
    "linear_kernel_gated": f"{RKM} --cell linear_kernel_gated",
    # Which default is better: attention below the last layer, after it, or after it and fed back; and what n-grams do.
    "rkm_lstm_attention_last": f"{RKM} --cell rkm_lstm --attention-layer 0",
    # Without graphs, each of which would hold every step of every layer.
    "rkm_lstm_input_feeding": f"{RKM_IN_STEPS} --cell rkm_lstm --attention-layer 0 --input-feeding",
    "rkm_lstm_1gram": f"{RKM} --cell rkm_lstm --encoder-ngram 1",
    # fairseq's own, of the same sizes, and its transformer at one that suits a corpus of this size.
    "fairseq_lstm": "--arch lstm --encoder-embed-dim 256 --encoder-hidden-size 256 --encoder-layers 2 "
    "--encoder-bidirectional --decoder-embed-dim 256 --decoder-hidden-size 512 --decoder-layers 2 "
    "--decoder-out-embed-dim 256 --dropout 0.3 --lr 3e-3 --warmup-updates 400",
    "fairseq_transformer": "--arch transformer --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-layers 4 "
    "--encoder-attention-heads 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-layers 4 "
    "--decoder-attention-heads 4 --dropout 0.3 --lr 5e-3 --warmup-updates 2000",
}
"""Flags of fairseq-train for each."""


@dataclass
class Run:
    """One model and seed."""

    args: argparse.Namespace
    model: str
    seed: int

    def __post_init__(self) -> None:
        about = json.loads((self.args.data / "data.json").read_text(encoding="utf-8"))
        self.source, self.target = about["languages"]
        self.tests = {split: name for split, name in about["splits"].items() if split.startswith("test")}

    @property
    def folder(self) -> Path:
        return self.args.out / f"{self.model}-{self.seed}"

    @property
    def result(self) -> Path:
        """What :meth:`measure`, or with ``--speed`` :meth:`time`, writes last."""
        return self.folder / ("speed.json" if self.args.speed else "result.json")

    def flags(self) -> list[str]:
        """fairseq-train's."""
        on_gpu = torch.cuda.is_available()
        text = f"{COMMON} {MODELS[self.model]} {ON_GPU if on_gpu else ON_CPU}".format(
            seed=self.seed, plugin=ROOT / "fairseq_rkm", graphs="--cuda-graphs" if on_gpu else ""
        )
        text += f" --source-lang {self.source} --target-lang {self.target} {self.args.train_flags}"
        return [str(self.args.data / "bin"), *text.split(), "--sentencepiece-model", str(self.pieces)]

    @property
    def pieces(self) -> Path:
        return self.args.data / "sentencepiece.bpe.model"

    def measure(self) -> None:
        """Train, choose, translate, score."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._train()
        valid, chosen = self._choose()
        model = self.folder / "model.pt"
        scores = {name: self._translate(model, split) for split, name in self.tests.items()}
        write_json(self.result, self._result(valid, chosen, scores))
        for path in (*self.folder.glob("checkpoint*.pt"), self.folder / "average.pt"):
            path.unlink()

    def _train(self) -> None:
        done, args = self.folder / "trained", self.args
        if done.is_file():
            return
        limits = [
            "--patience", args.patience, "--stop-time-hours", args.minutes / 60, "--keep-last-epochs", args.average
        ]  # fmt: skip
        flags = [*self.flags(), "--save-dir", self.folder, *limits]
        fairseq_command("train", flags, self.folder / "train.log", append=True)
        done.touch()

    def _choose(self) -> tuple[dict[str, float], str]:
        """Make model.pt of the better of the best checkpoint and the average; BLEU on the validation set of both."""
        if not list(self.folder.glob("checkpoint[0-9]*.pt")):
            minutes = self.args.minutes
            raise SystemExit(
                f"experiment: {self.folder.name} has no whole epoch after {minutes} minutes: give --minutes"
            )
        save(average(last_checkpoints(self.folder, self.args.average)), self.folder / "average.pt")
        valid = {
            name: self._translate(self.folder / f"{name}.pt", "valid")["bleu"]
            for name in ("checkpoint_best", "average")
        }
        chosen = max(valid, key=lambda name: valid[name])
        shutil.copy(self.folder / f"{chosen}.pt", self.folder / "model.pt")
        shutil.copy(self.pieces, self.folder)
        for language in (self.source, self.target):
            shutil.copy(self.args.data / "bin" / f"dict.{language}.txt", self.folder)
        return valid, chosen

    def _translate(self, checkpoint: Path, split: str) -> dict[str, Any]:
        """Translate a split: BLEU against the raw references, its signature, and sentences/s."""
        output = self.generate(checkpoint, split, self.folder / f"{split}.log")
        found = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.M))
        translations = [found[str(i)] for i in range(len(found))]
        (self.folder / f"{split}.txt").write_text("".join(line + "\n" for line in translations), encoding="utf-8")
        path = self.args.data / "raw" / f"{split}.{self.target}"
        references = path.read_text(encoding="utf-8").splitlines()
        if len(references) != len(translations):
            raise SystemExit(f"experiment: {len(translations)} translations of {len(references)} sentences of {split}")
        metric = sacrebleu.BLEU()
        score = metric.corpus_score(translations, [references]).score
        return {"bleu": score, "signature": str(metric.get_signature())}

    def generate(self, checkpoint: Path, split: str, log: Path) -> str:
        """fairseq-generate's output for a split."""
        cpu = [] if torch.cuda.is_available() else ["--cpu"]
        flags = [
            self.args.data / "bin", "--user-dir", ROOT / "fairseq_rkm", *cpu, "--task", "translation", "--source-lang",
            self.source, "--target-lang", self.target, "--path", checkpoint, "--gen-subset", split, "--batch-size", 128,
            "--beam", 5, "--max-len-a", 1.2, "--max-len-b", 10, "--required-batch-size-multiple", 1, "--tokenizer",
            "moses", "--bpe", "sentencepiece", "--sentencepiece-model", self.pieces, "--num-workers", 0,
            "--scoring", "sacrebleu",  # not counted here; fairseq's own scorer wants its C extension
        ]  # fmt: skip
        fairseq_command("generate", flags, log)
        return log.read_text(encoding="utf-8")

    def _result(self, valid: dict[str, float], chosen: str, scores: dict[str, Any]) -> dict[str, Any]:
        log = (self.folder / "train.log").read_text(encoding="utf-8")
        entries = [parse_line(line) for line in log.splitlines()]
        epochs = [entry for kind, entry in entries if kind == "train"]
        return {
            "model": self.model,
            "seed": self.seed,
            "languages": f"{self.source}-{self.target}",
            "parameters": int(re.search(r"num. shared model params: ([\d,]+)", log)[1].replace(",", "")),  # type: ignore[index]
            "bleu": {test: round(score["bleu"], 2) for test, score in scores.items()},
            "signature": next(iter(scores.values()))["signature"],
            "valid_bleu": {name: round(bleu, 2) for name, bleu in valid.items()},
            "chosen": chosen,
            "epochs": int(epochs[-1]["epoch"]),
            "updates": int(epochs[-1]["train_num_updates"]),
            "minutes": round(training_seconds(epochs) / 60, 2),
            "jobs_at_once": self.args.jobs,
            "command": portable(["fairseq-train", *self.flags()], DATA=self.args.data, OUT=self.args.out),
            "circumstances": circumstances(),
        }

    def time(self) -> None:
        """Tokens/s in training and sentences/s in generation, alone on the machine."""
        if not (self.folder / "model.pt").is_file():
            raise SystemExit(f"experiment: no {self.folder}/model.pt: train {self.model} first (without --speed)")
        log, updates = self.folder / "speed.log", self.args.speed_updates
        flags = ["--no-save", "--disable-validation", "--max-update", updates, "--save-dir", self.folder / "speed"]
        fairseq_command("train", [*self.flags(), *flags], log)
        shutil.rmtree(self.folder / "speed", ignore_errors=True)
        lines = log.read_text(encoding="utf-8").splitlines()
        entries = [entry for kind, entry in map(parse_line, lines) if kind == "train_inner"]
        rates = [float(entry["wps"]) for entry in entries[len(entries) // 3 :]]
        # A GPU has done with a test set before it is warm.
        split = "train" if torch.cuda.is_available() else "test"
        output = self.generate(self.folder / "model.pt", split, self.folder / f"speed_{split}.log")
        sentences = re.search(r"\(([\d.]+) sentences/s", output)
        figures = {
            "training_tokens_per_second": round(statistics.median(rates)),
            "generation_sentences_per_second": round(float(sentences[1]), 1),  # type: ignore[index]
            "generated": split,
            "circumstances": circumstances(),
        }
        write_json(self.result, figures)


def training_seconds(epochs: list[dict[str, str]]) -> float:
    """Of all epochs together, whatever interruptions there were between them."""
    return sum(float(entry["train_train_wall"]) for entry in epochs)


def outcome(folder: Path) -> str:
    """What a finished run has reached."""
    result = folder / "result.json"
    if not result.is_file():
        return "done"
    return ", ".join(f"{test} {bleu:.2f} BLEU" for test, bleu in json.loads(result.read_text())["bleu"].items())


def progress(folder: Path) -> str:
    """Where a run in training is."""
    log = folder / "train.log"
    if not log.is_file():
        return ""
    with log.open("rb") as content:
        content.seek(max(0, log.stat().st_size - 20_000))
        tail = content.read().decode(errors="replace").splitlines()
    valid = [entry for kind, entry in map(parse_line, tail) if kind == "valid"]
    return f"epoch {valid[-1]['epoch']} valid ppl {valid[-1]['valid_ppl']}" if valid else ""


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
    if args.speed_updates < 20:
        parser.error("--speed-updates must be at least 20: tokens/s are logged that often")
    return args


def main() -> None:
    """Command line."""
    args = parse_arguments()
    deadline = time.monotonic() + 60 * args.time_limit
    # Several jobs must not each take all processors.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    models = list(MODELS) if "all" in args.models else args.models
    runs = [Run(args, model, seed) for seed in args.seeds for model in models]
    waiting = [run for run in runs if not run.result.is_file()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} models are done; {args.jobs} at a time now", flush=True)
    tasks = [Task(run.folder.name, run.time if args.speed else run.measure, ()) for run in waiting]
    exit_if_failed(run_all(tasks, args.out, args.jobs, gpus(VISIBLE_GPUS), deadline, outcome, progress), args.out)


if __name__ == "__main__":
    main()
