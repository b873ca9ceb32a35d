"""From CSV files to classes of new text, as a user goes: prepare.py, fairseq's commands, predict."""

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli.conftest import ROOT, Result, fairseq, succeed
from fairseq_rkm import RKMError, predict
from fairseq_rkm.models import RKMClassifier

PREPARE = ["examples/document_classification/prepare.py"]
TASK = ["--user-dir", "fairseq_rkm", "--task", "sentence_prediction", "--max-positions", "100000", "--cpu"]
SMALL = [
    *TASK, "--criterion", "sentence_prediction", "--num-classes", "3", "--no-shuffle", "--arch", "rkm_classifier",
    "--encoder-embed-dim", "16", "--encoder-hidden-size", "16", "--classifier-hidden-size", "16", "--optimizer", "adam",
    "--lr", "0.01", "--clip-norm", "1", "--batch-size", "16", "--required-batch-size-multiple", "1", "--num-workers",
    "0", "--no-epoch-checkpoints", "--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric",
    "--log-format", "json", "--log-interval", "1",
]  # fmt: skip
NAMES = ["World", "Sports & Games", "Business"]
TEXTS = {
    1: "minister embassy troops talks border elections parliament rebels treaty ceasefire president envoy",
    2: "striker season coach goal league cup medal innings champions referee final playoffs",
    3: "shares profit merger oil prices investors quarter earnings stocks bank bid analysts",
}
COMMON = "the a new said on in after his over week for with against from Tuesday Reuters (AP) -- , . 's"


def run(*arguments: object) -> Result:
    """Run a Python command in the repository's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return Result(result.returncode, result.stdout + result.stderr)


def news(count: int, seed: int) -> list[tuple[int, str, str]]:
    """Rows of class, title and text that look like news."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(list(TEXTS))
        words = [
            draw.choice((TEXTS[label] if draw.random() < 0.4 else COMMON).split()) for _ in range(draw.randrange(5, 40))
        ]
        cut = draw.randrange(1, 5)
        rows.append((label, " ".join(words[:cut]).capitalize(), " ".join(words[cut:])))
    return rows


def write(path: Path, rows: list[tuple[int, str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return path


def held_out() -> list[tuple[int, str, str]]:
    """An empty document, one of one word, one of unseen words, one of 20,000, and news."""
    long = (2, "A document of 20,000 words", " ".join(["season"] * 20_000))
    return [(1, "", ""), (2, "goal", ""), (3, "Unseen", "zyx wvu"), long, *news(100, 1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("csv") / "news"
    folder.mkdir()
    write(folder / "train.csv", news(400, 0))
    write(folder / "test.csv", held_out())
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(files) -> Path:
    result = run(
        *PREPARE, "--train", files / "train.csv", "--test", files / "test.csv", "--classes", files / "classes.txt",
        "--lowercase", "--valid-fraction", 0.1, "--out", files / "data",
    )  # fmt: skip
    assert result.status == 0, result.output
    assert "train: 360 documents" in result.output
    assert "3 classes: World, Sports & Games, Business" in result.output
    return files / "data"


@pytest.fixture(scope="module")
def trained(data) -> tuple[Path, Result]:
    folder = data.parent / "run"
    result = succeed(
        "train", data, *SMALL, "--ngram", 3, "--encoder-bidirectional", "--max-epoch", 3, "--save-dir", folder
    )
    return folder, result


@pytest.fixture(scope="module")
def classifier(trained):
    return RKMClassifier.from_pretrained(trained[0])


def test_training_learns_and_an_epoch_sees_every_document(trained):
    _, result = trained
    assert float(result.entries("valid")[-1]["valid_accuracy"]) > 90
    updates = [entry for entry in result.entries("train_inner") if int(entry["epoch"]) == 1]
    assert sum(round(float(entry["bsz"])) for entry in updates) == 360


def test_documents_of_a_batch_are_about_equally_long(trained):
    _, result = trained
    steps = [float(e["wpb"]) / float(e["bsz"]) for e in result.entries("train_inner") if int(e["epoch"]) == 1]
    assert max(steps) > 2 * min(steps), "batches differ in length"


def test_fairseq_validate_and_the_confusion_matrix_agree(trained, data, classifier):
    folder, _ = trained
    result = succeed(
        "validate", data, *TASK, "--criterion", "sentence_prediction", "--num-classes", 3, "--path",
        folder / "checkpoint_best.pt", "--batch-size", 8, "--valid-subset", "test", "--log-format", "json",
        "--required-batch-size-multiple", 1,
    )  # fmt: skip
    accuracy = float(re.findall(r'"test_accuracy": "([\d.]+)"', result.output)[-1])
    matrices = [classifier.confusion("test", batch_size) for batch_size in (1, 64)]
    assert torch.equal(*matrices)
    assert matrices[0].sum() == 104
    assert accuracy == pytest.approx(100 * matrices[0].trace().item() / 104, abs=0.06)


def test_predictions_do_not_depend_on_the_batch_and_agree_with_the_binarized_split(files, classifier):
    texts = [f"{title} {text}" for _, title, text in held_out()]
    together, alone = classifier.predict(texts), classifier.predict(texts, batch_size=1)
    assert [p.label for p in together] == [p.label for p in alone]
    assert max(abs(p.probability - q.probability) for p, q in zip(together, alone, strict=True)) < 1e-5
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for (label, _, _), prediction in zip(held_out(), together, strict=True):
        matrix[label - 1, NAMES.index(prediction.label)] += 1
    assert torch.equal(matrix, classifier.confusion("test"))


def test_predict_reads_any_text_and_writes_a_line_for_each(trained, tmp_path, monkeypatch, capsys):
    texts = "Striker out of cup final\n\nOil shares fall on profit\r\nzyx wvu\rministers meet rebels in treaty talks"
    (tmp_path / "texts").write_bytes(texts.encode())
    checkpoint = trained[0] / "checkpoint_best.pt"
    result = run("-m", "fairseq_rkm.predict", "--cpu", "--path", checkpoint, "--input", tmp_path / "texts")
    lines = [line.split("\t") for line in result.output.splitlines()]
    assert [lines[i][0] for i in (0, 2, 4)] == ["Sports & Games", "Business", "World"]
    assert len(lines) == 5
    assert all(1 / 3 <= float(probability) <= 1 for _, probability in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts.encode())))
    predict.main(["--cpu", "--path", str(checkpoint), "--buffer-size", "2", "--batch-size", "1"])
    assert capsys.readouterr().out == result.output


def test_a_checkpoint_with_its_dictionaries_beside_it_needs_no_data(trained, data, tmp_path, classifier):
    for name in ("preparation.json", "input0/dict.txt", "label/dict.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(data / name, tmp_path / name)
    shutil.copy(trained[0] / "checkpoint_best.pt", tmp_path)
    assert RKMClassifier.from_pretrained(tmp_path).predict(["cup"]) == classifier.predict(["cup"])


def test_mistakes_with_a_trained_classifier(trained, data, tmp_path, classifier):
    folder, _ = trained
    (tmp_path / "latin1").write_bytes("fine\ncaf\xe9\n".encode("latin1"))
    for arguments, message in (
        (["--path", folder / "none.pt"], "no checkpoint at"),
        (["--path", folder / "checkpoint_best.pt", "--input", tmp_path / "none"], "no file of texts at"),
        (["--path", folder / "checkpoint_best.pt", "--data", tmp_path], "no dictionary at"),
        (["--path", folder / "checkpoint_best.pt", "--input", tmp_path / "latin1"], "latin1, line 2, byte "),
        (["--path", data / "input0" / "train.bin"], "not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=f"fairseq-rkm: error: .*{message}"):
            predict.main(["--cpu", *map(str, arguments)])
    with pytest.raises(RKMError, match="takes a list of texts"):
        classifier.predict("cup")
    with pytest.raises(RKMError, match="batch size must be at least 1, not 0"):
        classifier.predict(["cup"], batch_size=0)
    assert classifier.predict([]) == []
    other = tmp_path / "other"
    shutil.copytree(data, other)
    lines = (data / "input0" / "dict.txt").read_text().splitlines()
    (other / "input0" / "dict.txt").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(RKMError, match="trained with another dictionary"):
        RKMClassifier.from_pretrained(folder, data_name_or_path=other)
    shutil.copy(data / "input0" / "dict.txt", other / "input0")
    preparation = json.loads((data / "preparation.json").read_text())
    for checksums, message in ((preparation["checksums"], "the classes in it have changed"), ({}, "has 2 classes and")):
        changed = {**preparation, "classes": ["a", "b"], "checksums": checksums}
        (other / "preparation.json").write_text(json.dumps(changed))
        with pytest.raises(RKMError, match=message):
            RKMClassifier.from_pretrained(folder, data_name_or_path=other)


def test_data_that_do_not_fit_the_flags_are_refused_before_training(data, tmp_path):
    result = fairseq("train", data, *SMALL, "--num-classes", 2, "--save-dir", tmp_path / "run", "--max-update", 1)
    assert "is of class 3 of label/dict.txt, but --num-classes is 2" in result.error
    assert "train_inner" not in result.output


def test_long_documents_may_be_cut_and_word_vectors_frozen(data, tmp_path):
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("season " + " ".join(["0.5"] * 16) + "\n")
    result = succeed(
        "train", data, *SMALL, "--max-positions", 20, "--shorten-method", "truncate", "--encoder-embed-path", vectors,
        "--encoder-freeze-embed", "--pooling", "max", "--no-layer-norm", "--max-update", 2, "--save-dir", tmp_path,
    )  # fmt: skip
    assert "1 of the dictionary's" in result.output
    weight = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["model"]["embed_tokens.weight"]
    assert weight.eq(0.5).all(dim=1).sum() == 1


def test_the_configuration_for_hydra_trains_the_same_model(data, tmp_path):
    train = ["bash", "examples/document_classification/train.sh", "agnews", data, tmp_path / "run"]
    changes = [
        "common.cpu=true", "task.num_classes=3", "model.cell=ran", "+model.layer_norm=false", "common.log_interval=1",
        "+model.encoder_embed_dim=16", "+model.encoder_hidden_size=16", "optimization.max_update=3",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*train, *changes], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"update 3  epoch 1  training accuracy +\S+  \S+ tokens/s\n  valid accuracy \S+ after 3", done.stdout
    )
    classifier = RKMClassifier.from_pretrained(tmp_path / "run")
    assert (classifier.model.rkm.cell, classifier.model.rkm.layer_norm) == ("ran", False)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["confusion"] == classifier.confusion("test").tolist()
    assert (result["dataset"], result["model"], result["seed"]) == (data.name, "ran", 1)
    assert f"test accuracy {result['accuracy']:.2f}%" in done.stdout
    assert f"| RAN, 1-gram | {result['weights']:,} | {result['accuracy']:.2f} | 1 |" in done.stdout


def test_the_table_goes_on_where_it_stopped(files, tmp_path):
    command = [
        "examples/document_classification/table.py", "--data", files.parent, "--datasets", "news", "--out", tmp_path,
        "--models", "rkm_cifg", "logistic_regression", "torch_lstm", "--ngrams", 3, "--epochs", 5, "--cpu",
    ]  # fmt: skip
    small = ["--", "--encoder-embed-dim", 16, "--encoder-hidden-size", 16, "--lr", 0.02]
    first = run(*command, "--models", "logistic_regression")
    assert first.status == 0, first.output
    assert "0 of 1 classifiers are done" in first.output
    second = run(*command, "--jobs", 2, *small)
    assert second.status == 0, second.output
    assert "1 of 3 classifiers are done" in second.output
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("news/*/result.json")}
    assert set(results) == {"rkm_cifg-3gram-seed1", "logistic_regression-1gram-seed1", "torch_lstm-1gram-seed1"}
    for result in results.values():
        assert sum(map(sum, result["confusion"])) == 104
        assert result["accuracy"] > 80
        assert result["classes"] == NAMES
    trained = results["rkm_cifg-3gram-seed1"]
    assert len(trained["curve"]) == 5
    assert trained["command"].startswith("fairseq-train DATA --user-dir ./fairseq_rkm ")
    assert str(tmp_path) not in trained["command"], "a command is for other machines as well"
    assert not list(tmp_path.glob("news/*/*.pt"))
