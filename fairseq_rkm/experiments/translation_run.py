"""One translation model of the table: train, average, translate, score, and measure speed."""

import argparse
import json
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fairseq_cli.generate
import fairseq_cli.train  # noqa: F401  imported once, before tasks are forked
import sacrebleu
import torch

from fairseq_rkm.experiments.checkpoint_averages import average, last_checkpoints, save
from fairseq_rkm.experiments.circumstances import PLUGIN, circumstances, portable
from fairseq_rkm.experiments.fairseq_command import fairseq_command
from fairseq_rkm.experiments.fairseq_log import entries
from fairseq_rkm.experiments.result_files import write_json
from fairseq_rkm.experiments.translation_models import COMMON, MODELS, ON_CPU, ON_GPU


@dataclass
class Run:
    """The run of one model and seed."""

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
        """The file that :meth:`measure` writes last, or :meth:`time` with ``--speed``."""
        return self.folder / ("speed.json" if self.args.speed else "result.json")

    def flags(self) -> list[str]:
        """The flags for fairseq-train."""
        on_gpu = torch.cuda.is_available()
        text = f"{COMMON} {MODELS[self.model]} {ON_GPU if on_gpu else ON_CPU}".format(
            seed=self.seed, plugin=PLUGIN, graphs="--cuda-graphs" if on_gpu else ""
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
        """Compare the best checkpoint with the average by validation BLEU, and copy the better to model.pt."""
        if not list(self.folder.glob("checkpoint[0-9]*.pt")):
            (self.folder / "trained").unlink()  # a further call then trains on
            minutes = self.args.minutes
            raise SystemExit(
                f"table: {self.folder.name} has no whole epoch after {minutes:g} minutes: allow more of them, as "
                f"--minutes {2 * minutes:g}"
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
        """Translate a split; BLEU against the raw references, and its signature."""
        output = self.generate(checkpoint, split, self.folder / f"{split}.log")
        found = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.M))
        translations = [found[str(i)] for i in range(len(found))]
        (self.folder / f"{split}.txt").write_text("".join(line + "\n" for line in translations), encoding="utf-8")
        path = self.args.data / "raw" / f"{split}.{self.target}"
        references = path.read_text(encoding="utf-8").splitlines()
        if len(references) != len(translations):
            raise SystemExit(f"table: {len(translations)} translations of {len(references)} sentences of {split}")
        metric = sacrebleu.BLEU()
        score = metric.corpus_score(translations, [references]).score
        return {"bleu": score, "signature": str(metric.get_signature())}

    def generate(self, checkpoint: Path, split: str, log: Path) -> str:
        """fairseq-generate's output for a split."""
        cpu = [] if torch.cuda.is_available() else ["--cpu"]
        flags = [
            self.args.data / "bin", "--user-dir", PLUGIN, *cpu, "--task", "translation", "--source-lang",
            self.source, "--target-lang", self.target, "--path", checkpoint, "--gen-subset", split, "--batch-size", 128,
            "--beam", 5, "--max-len-a", 1.2, "--max-len-b", 10, "--required-batch-size-multiple", 1, "--tokenizer",
            "moses", "--bpe", "sentencepiece", "--sentencepiece-model", self.pieces, "--num-workers", 0,
            "--scoring", "sacrebleu",  # sacrebleu scores above; fairseq's own scorer needs its C extension
        ]  # fmt: skip
        fairseq_command("generate", flags, log)
        return log.read_text(encoding="utf-8")

    def _result(self, valid: dict[str, float], chosen: str, scores: dict[str, Any]) -> dict[str, Any]:
        log = (self.folder / "train.log").read_text(encoding="utf-8")
        epochs = entries(log.splitlines(), "train")
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
        """Measure tokens/s in training and sentences/s in generation; nothing else should run on the machine."""
        if not (self.folder / "model.pt").is_file():
            raise SystemExit(f"table: no {self.folder}/model.pt: train {self.model} first (without --speed)")
        log, updates = self.folder / "speed.log", self.args.speed_updates
        flags = ["--no-save", "--disable-validation", "--max-update", updates, "--save-dir", self.folder / "speed"]
        fairseq_command("train", [*self.flags(), *flags], log)
        shutil.rmtree(self.folder / "speed", ignore_errors=True)
        intervals = entries(log.read_text(encoding="utf-8").splitlines(), "train_inner")
        rates = [float(entry["wps"]) for entry in intervals[len(intervals) // 3 :]]
        # A test set is too short to warm a GPU up.
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
    """The seconds of training in all epochs, without interruptions."""
    return sum(float(entry["train_train_wall"]) for entry in epochs)
