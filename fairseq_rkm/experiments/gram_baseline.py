"""Classify documents by the untrained recurrent machine: its Gram matrix and an SVM, beside logistic regression.

    python examples/document_classification/gram.py --train train.csv --test test.csv --kernels linear gaussian

A word is a vector of latent semantic analysis, learned from the training documents without their classes. The matrix is
normalised, so that each document has length 1, and an SVM is trained on it. Its C is the best of 1, 10 and 100 for a
fifth of the training documents. A Gaussian's s is the words' typical length unless ``--scale`` names another. The time
and memory of a matrix grow with the square of the number of documents: ``--documents`` and ``--test-documents`` take so
many, evenly over each file.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from fairseq_rkm.data.labelled_csv import Document, read_rows
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.circumstances import circumstances
from fairseq_rkm.kernels import POOLINGS, recurrent_gram
from fairseq_rkm.ops.kernel_functions import KERNELS, resolve_kernel

STRENGTHS = 1.0, 10.0, 100.0
"""The values of C to choose from."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(arguments)
    try:
        run(args)
    except RKMError as error:
        sys.exit(f"gram: error: {error}")


def run(args: argparse.Namespace) -> None:
    """Print a row for each model, and write them to ``--out``.

    Raises:
        RKMError: a file holds no documents, or a kernel refuses its numbers.
    """
    train, test = evenly(args.train, args.documents), evenly(args.test, args.test_documents)
    labels = [np.array([document.label for document in documents]) for documents in (train, test)]
    rows = [{"model": "logistic regression", **logistic_regression(train, test)}]
    report(rows[0])
    sequences = [s.to(args.device) for s in word_vectors(train, test, args.features, args.seed)]
    for kernel in args.kernels:
        start = time.monotonic()
        gram = normalised(recurrent_gram(
            sequences, kernel=kernel, sigma_f2=args.sigma_f2, ngram=args.ngram, pooling=args.pooling,
            **parameters(kernel, args.degree, args.scale, sequences, args.ngram),
        ))  # fmt: skip
        seconds = time.monotonic() - start
        right = accuracy(gram.cpu().numpy(), labels[0], labels[1])
        rows.append({"model": f"{kernel} kernel", "accuracy": right, "seconds": seconds})
        report(rows[-1])
    if args.out:
        about = {name: str(value) for name, value in vars(args).items()}
        args.out.write_text(
            json.dumps({"rows": rows, "flags": about, "circumstances": circumstances()}, indent=1) + "\n"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="a CSV file of training documents, a document a row, its class first")
    add("--test", type=Path, required=True, help="a CSV file of test documents")
    add("--documents", type=int, default=5000, help="training documents (default: 5000)")
    add("--test-documents", type=int, default=1000, help="test documents (default: 1000)")
    add("--kernels", nargs="+", choices=list(KERNELS), default=["linear", "gaussian", "arccos"])
    add("--degree", type=int, help="of polynomial and arccos")
    add("--scale", type=float, help="s of polynomial and gaussian")
    add("--sigma-f2", type=float, default=0.5, help="the weight of the past (default: 0.5); 0 compares words alone")
    add("--ngram", type=int, default=1, help="words that a step sees (default: 1)")
    add("--pooling", choices=POOLINGS, default="mean", help="default: mean")
    add("--features", type=int, default=64, help="the numbers of a word's vector (default: 64)")
    add("--seed", type=int, default=1, help="of the words' vectors (default: 1)")
    add("--device", default="cpu", help="where the matrix is computed (default: cpu)")
    add("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(arguments)
    for name in ("documents", "test_documents", "features"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def evenly(path: Path, count: int) -> list[Document]:
    """So many documents, evenly over a file; all if it has no more.

    Raises:
        RKMError: the file is missing or holds no documents.
    """
    documents = [row for row in read_rows(path) if isinstance(row, Document)]
    if not documents:
        raise RKMError(f"{path} holds no labelled documents")
    chosen = np.linspace(0, len(documents), min(count, len(documents)), endpoint=False).astype(int)
    return [documents[i] for i in chosen]


def logistic_regression(train: list[Document], test: list[Document]) -> dict[str, Any]:
    """Logistic regression on TF-IDF of words and pairs: its accuracy on the test documents, and the seconds."""
    start = time.monotonic()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=5, max_iter=1000)
    model.fit(vectorizer.fit_transform([d.text for d in train]), [d.label for d in train])
    right = model.score(vectorizer.transform([d.text for d in test]), [d.label for d in test])
    return {"accuracy": 100 * float(right), "seconds": time.monotonic() - start}


def word_vectors(train: list[Document], test: list[Document], features: int, seed: int) -> list[Tensor]:
    """Each document as ``(words, features)`` float32, without words that stand in one training document or none.

    A word's direction is its row of the truncated SVD of the training documents' TF-IDF, which sees no classes (latent
    semantic analysis). Its length is its inverse document frequency.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    table = vectorizer.fit_transform([document.text for document in train])
    rows = TruncatedSVD(min(features, *(size - 1 for size in table.shape)), random_state=seed).fit(table).components_.T
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    vectors = torch.from_numpy((rows / np.maximum(lengths, 1e-12) * vectorizer.idf_[:, None]).astype(np.float32))
    words, numbers = vectorizer.build_analyzer(), vectorizer.vocabulary_
    return [vectors[[numbers[w] for w in words(d.text) if w in numbers]] for d in (*train, *test)]


def parameters(
    kernel: str, degree: int | None, scale: float | None, sequences: list[Tensor], ngram: int
) -> dict[str, Any]:
    """The degree and s of a kernel: those given, where it has them, or a Gaussian's own s.

    A Gaussian's s is the typical length of a window, the root of n times a step's.
    """
    row = resolve_kernel(kernel)
    if kernel == "gaussian" and scale is None:
        scale = typical_length(sequences) * ngram**0.5
    return {
        "degree": None if row.degree is None else degree,
        "scale": scale if "scale" in row.parameters else None,
    }


def typical_length(sequences: list[Tensor]) -> float:
    """The root of the mean squared length of all steps' vectors."""
    return torch.cat(sequences).square().sum(1).mean().sqrt().item()


def normalised(gram: Tensor) -> Tensor:
    """The matrix of the same points, each scaled to length 1; a point at 0 stays there."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0)
    return gram * scale * scale.unsqueeze(1)


def accuracy(gram: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    """The per cent of test documents, the last rows, that an SVM trained on the others classifies rightly."""
    count = len(train)
    held = np.arange(count) % 5 == 0
    known = gram[:count, :count]

    def score(strength: float) -> float:
        model = SVC(kernel="precomputed", C=strength).fit(known[~held][:, ~held], train[~held])
        return float(model.score(known[held][:, ~held], train[held]))

    best = max(STRENGTHS, key=score)
    return 100 * float(SVC(kernel="precomputed", C=best).fit(known, train).score(gram[count:, :count], test))


def report(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(f"{row['model']:22} {row['accuracy']:6.2f}%  {row['seconds']:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
