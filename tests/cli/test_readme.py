"""The commands of the README and of manuals in their order, as a reader types them, on small data."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from signal_samples import waves, write_npz

from cli.conftest import ROOT, write_text
from cli.test_document_classification import news

NAMES = ("README.md", "docs/signals.md", "docs/language_models.md", "docs/classification.md")
README, SIGNALS, LANGUAGE, DOCUMENTS = ((ROOT / name).read_text() for name in NAMES)
COMMANDS = ("preprocess", "train", "eval_lm", "generate", "interactive", "validate")


def section(title: str, document: str = README, language: str = "bash") -> str:
    """The commands below a heading, of the shell or of Python."""
    (text,) = (part for part in document.split("\n## ") if part.startswith(title))
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, re.S))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with the repository's parts in which runs/ is its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("fairseq_rkm", "examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    modules = {"python": "", **{f"fairseq-{name.replace('_', '-')}": f"-m fairseq_cli.{name} " for name in COMMANDS}}
    for command, module in modules.items():
        (folder / "bin" / command).write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        (folder / "bin" / command).chmod(0o755)
    return folder


def type_in(checkout: Path, commands: str) -> str:
    """Run commands in one shell, each of which must succeed; the output."""
    environment = {
        **os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    shell = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", commands],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert shell.returncode == 0, (shell.stdout + shell.stderr)[-5000:]
    return shell.stdout + shell.stderr


@pytest.fixture(scope="module")
def language_model(checkout, tmp_path_factory) -> str:
    """What the commands for a language model print; the model is in runs/lm/run."""
    commands = section("Train a language model").replace("TEXT", str(write_text(tmp_path_factory.mktemp("text"))))
    assert "fairseq-eval-lm runs/lm/data" in commands
    return type_in(checkout, commands.replace("--max-epoch 10", "--max-epoch 2"))


@pytest.fixture(scope="module")
def classifier(checkout) -> str:
    """What the commands for a classifier print; the model is in runs/documents/run."""
    for split, count in (("train", 200), ("test", 20)):
        with (checkout / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(news(count, len(split)))
    commands = section("Classify documents")
    assert "fairseq_rkm.predict" in commands
    return type_in(checkout, commands.replace("--max-epoch 5", "--max-epoch 1").replace("classes 4", "classes 3"))


def test_a_classifier_of_one_s_own_signals(checkout):
    for name, count in (("train", 40), ("test", 8), ("recordings", 3)):
        write_npz(checkout / f"{name}.npz", **waves(count, steps=400, seed=count))
    commands = "\n".join(section(title, SIGNALS) for title in ("Prepare", "Train", "Predict"))
    assert "--max-epoch 20" in commands
    printed = type_in(checkout, commands.replace("--max-epoch 20", "--max-epoch 1") + "\ncat classes.tsv")
    assert "windows of 200 steps, one every 100" in printed
    assert len(re.findall(r"^(?:alpha|beta)\t0\.\d{4}$", printed, re.M)) == 3


def test_a_language_model_on_text_of_one_s_own(language_model):
    assert float(re.search(r"Perplexity: ([\d.]+)", language_model)[1]) < 40


@pytest.mark.usefixtures("language_model")
def test_the_manual_s_generation_goes_on_with_the_readme_s_model(checkout):
    commands = section("Generate text", LANGUAGE).replace("the following example", "w1 w2 none")
    (checkout / "generate.py").write_text(section("Generate text", LANGUAGE, "python"))
    printed = type_in(checkout, f"{commands}\npython -W ignore generate.py")
    assert re.search(r"^w1 w2 <unk>( (w\d+|</s>))+$", printed, re.M)


@pytest.mark.usefixtures("classifier")
def test_the_manual_s_prediction_goes_on_with_the_readme_s_model(checkout):
    (checkout / "texts.txt").write_text("Stocks fell\nA match\n")
    (checkout / "predict.py").write_text(section("Predict", DOCUMENTS, "python"))
    commands = section("Predict", DOCUMENTS)
    printed = type_in(checkout, f"{commands}\ncat classes.tsv\npython -W ignore predict.py")
    assert len(re.findall(r"^[123]\t0\.\d{4}$", printed, re.M)) == 2


def test_a_classifier_of_one_s_own_documents(classifier):
    assert re.search(r"^[123]\t0\.\d{4}$", classifier, re.M)


@pytest.mark.usefixtures("language_model", "classifier")
def test_what_is_trained_runs_elsewhere_as_the_manual_of_exporting_says(checkout):
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library, reason=f"needs {library} (pip install '.[onnx]')")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(), re.S)
    assert len(blocks) == 4
    for i, block in enumerate(blocks):
        (checkout / f"block{i}.py").write_text(block)
    printed = type_in(checkout, "for i in 0 1 2 3; do python -W ignore block$i.py; done; ls")
    assert "fairseq" not in blocks[2]
    assert re.search(r"^(w\d+|</s>)( (w\d+|</s>)){9}$", printed, re.M), "a text of ten words"
    assert {"rnn.onnx", "lm.onnx", "classifier.onnx"} <= set(printed.split())


def test_the_folders_of_the_commands_do_not_collide():
    folders = re.findall(r"(?:--destdir|--save-dir|--out) (\S+)", README + SIGNALS)
    assert len(folders) == len(set(folders)) == 6
    assert all(folder.startswith("runs/") for folder in folders)
