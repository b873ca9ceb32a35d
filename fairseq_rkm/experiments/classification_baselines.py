"""Baselines on the same documents: TF-IDF with logistic regression, and an LSTM in plain PyTorch."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, data_utils
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_rkm.data.labelled_csv import Document, read_rows

DOCUMENTS_A_BATCH, MAX_TOKENS = 64, 16384
LSTM_SIZE = 300


def confusion_matrix(classes: int, labels: Tensor, predicted: Tensor) -> list[list[int]]:
    """Count the documents of class i (row) that were taken for class j (column); both counted from 0."""
    return (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes).tolist()


def logistic_regression(train: Path, test: Path) -> dict[str, Any]:
    """Multinomial logistic regression on TF-IDF of words and pairs of words.

    It needs no validation documents, and learns from all rows of the training file.

    Args:
        train: a CSV file of training documents.
        test: a CSV file of test documents.

    Returns:
        The confusion matrix, the numbers of weights and parameters, and the seconds of training.
    """
    documents = {path: [row for row in read_rows(path) if isinstance(row, Document)] for path in (train, test)}
    classes = sorted({document.label for document in documents[train]}, key=int)
    labels = {path: [classes.index(document.label) for document in rows] for path, rows in documents.items()}
    start = time.monotonic()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = LogisticRegression(C=5, max_iter=1000)
    model.fit(vectorizer.fit_transform([document.text for document in documents[train]]), labels[train])
    seconds = time.monotonic() - start
    predicted = model.predict(vectorizer.transform([document.text for document in documents[test]]))
    return {
        "confusion": confusion_matrix(len(classes), torch.tensor(labels[test]), torch.tensor(predicted)),
        "weights": model.coef_.size,
        "parameters": model.coef_.size + model.intercept_.size,
        "curve": [],
        "seconds_per_epoch": seconds,
    }


class PlainLSTM(nn.Module):
    """Embedding, ``torch.nn.LSTM``, mean over the document, linear layer; no dropout, no layer norm."""

    def __init__(self, words: int, classes: int, padding: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, LSTM_SIZE, padding_idx=padding)
        self.lstm = nn.LSTM(LSTM_SIZE, LSTM_SIZE)
        self.output = nn.Linear(LSTM_SIZE, classes)
        self.padding = padding

    def forward(self, tokens: Tensor) -> Tensor:
        """Map words, ``(B, T)`` int64 and padded on the right, to logits ``(B, classes)``."""
        real = tokens.ne(self.padding).t().unsqueeze(-1)
        output, _ = self.lstm(self.embedding(tokens.t()))
        return self.output((output * real).sum(0) / real.sum(0))


class Split:
    """A binarized split: documents and their classes, from 0."""

    def __init__(self, data: Path, split: str) -> None:
        self.words, labels = (Dictionary.load(str(data / kind / "dict.txt")) for kind in ("input0", "label"))
        self.classes = len(labels) - labels.nspecial
        self.documents = data_utils.load_indexed_dataset(str(data / "input0" / split), self.words)
        stored = data_utils.load_indexed_dataset(str(data / "label" / split), labels)
        self.labels = torch.tensor([int(stored[i][0]) - labels.nspecial for i in range(len(stored))])

    def batches(self, device: torch.device, draw: np.random.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of documents of about one length, ``(B, T)``, and their classes, ``(B,)``; ``draw`` shuffles them."""
        sizes = self.documents.sizes.astype(np.int64)
        noise = 0 if draw is None else draw.uniform(0, 1, len(sizes))
        order = np.argsort(sizes + noise, kind="stable")
        batches = data_utils.batch_by_size(
            order, sizes.__getitem__, sizes[order], max(MAX_TOKENS, sizes.max()), DOCUMENTS_A_BATCH
        )
        if draw is not None:
            draw.shuffle(batches)
        for rows in batches:
            tokens = data_utils.collate_tokens([self.documents[i] for i in rows], self.words.pad())
            yield tokens.long().to(device), self.labels[rows].to(device)


@torch.no_grad()
def evaluate(model: PlainLSTM, split: Split, device: torch.device) -> list[list[int]]:
    """The split's confusion matrix."""
    pairs = [(labels, model(tokens).argmax(1)) for tokens, labels in split.batches(device)]
    labels, predicted = (torch.cat(tensors).cpu() for tensors in zip(*pairs, strict=True))
    return confusion_matrix(split.classes, labels, predicted)


def accuracy(confusion: list[list[int]]) -> float:
    """The accuracy that a confusion matrix shows, in per cent."""
    return 100 * sum(row[i] for i, row in enumerate(confusion)) / sum(map(sum, confusion))


def plain_lstm(data: Path, epochs: int, seed: int, device: torch.device, lr: float = 1e-3) -> dict[str, Any]:
    """Train with Adam, and test the weights that were best in validation."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    train, valid, test = (Split(data, split) for split in ("train", "valid", "test"))
    model = PlainLSTM(len(train.words), train.classes, train.words.pad()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    curve: list[tuple[int, float]] = []
    best: list[list[int]] = []
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        start = time.monotonic()
        for tokens, labels in train.batches(device, draw):
            loss = F.cross_entropy(model(tokens), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1)
            optimizer.step()
        loss.item()  # a GPU is done only when its result is read
        seconds += time.monotonic() - start
        reached = accuracy(evaluate(model, valid, device))
        if all(reached > earlier for _, earlier in curve):
            best = evaluate(model, test, device)
        curve.append((epoch, reached))
        print(f"epoch {epoch}: valid accuracy {reached:.2f}", flush=True)
    return {
        "confusion": best,
        "weights": sum(p.numel() for name, p in model.lstm.named_parameters() if name.startswith("weight")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "seconds_per_epoch": seconds / epochs,
    }
