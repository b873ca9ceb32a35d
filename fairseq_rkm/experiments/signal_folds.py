"""Train the folds of an experiment side by side.

Each fold has its own windows, means and scales, batches, dropout, gradient norm and first weights, so that its result
is the one that it has alone. On a GPU folds are branches of one CUDA graph, each by the fast kernels, where these leave
room for each other. Elsewhere ``torch.func`` maps one model over the folds' parameters, which have a dimension of
folds; a single fold runs by the fast kernels in place of a map.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from fairseq_rkm.data.signals import Recordings, scales, window_starts
from fairseq_rkm.data.signals.splits import ordered
from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.signal_branches import Branches
from fairseq_rkm.modules import RKM
from fairseq_rkm.ops import resolve_cell
from fairseq_rkm.ops.dispatch import leaves_room

HEAD = "sentence_classification_head"
EVALUATED_AT_A_TIME = 256


@dataclass
class Windows:
    """All windows of an experiment, in their own units.

    Attributes:
        values: ``(windows, time, channels)`` float32, zero behind a window's end.
        lengths: ``(windows,)`` int64.
        labels: ``(windows,)`` int64, from 0.
        recordings: ``(windows,)`` int64: the recording that each is of, from 0.
        classes: the classes' names.
    """

    values: Tensor
    lengths: Tensor
    labels: Tensor
    recordings: np.ndarray
    classes: list[str]

    @property
    def padded(self) -> bool:
        """Whether windows differ in length."""
        return bool((self.lengths != self.values.size(1)).any())


class Fold(NamedTuple):
    """One division into training and test windows.

    Attributes:
        name: the group that is left out, or the seed.
        train: numbers of windows.
        test: numbers of windows.
        mean: each channel's mean in the training part.
        deviation: each channel's standard deviation there.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class Training:
    """How folds are trained: AdamW, its learning rate falling linearly to zero. Nothing is chosen by a test part."""

    epochs: int = 20
    lr: float = 0.002
    batch_size: int = 32
    weight_decay: float = 0.01
    clip_norm: float = 1.0


class Outcome(NamedTuple):
    """What training leaves.

    Attributes:
        probabilities: for each fold those of its test windows, ``(windows, classes)`` float32.
        models: for each fold its parameters by name, on the CPU.
        losses: ``(updates, folds)``: the training loss of each update.
        seconds: of training alone.
    """

    probabilities: list[Tensor]
    models: list[dict[str, Tensor]]
    losses: Tensor
    seconds: float


def windows_of(recordings: Recordings, window: int | None, stride: int) -> Windows:
    """Cut recordings into windows.

    Raises:
        RKMError: a recording is shorter than a window, or there is one class only.
    """
    classes = ordered(set(recordings.known_labels()))
    if len(classes) < 2:
        raise RKMError(f"{recordings.source}: all recordings are of the class {classes[0]!r}")
    starts = window_starts(recordings, window, stride)
    pieces = [
        torch.from_numpy(signal[at : at + (window or len(signal))])
        for signal, first in zip(recordings.signals, starts, strict=True)
        for at in first
    ]
    numbers = np.repeat(np.arange(len(recordings)), [len(first) for first in starts])
    labels = torch.tensor([classes.index(label) for label in recordings.known_labels()])
    return Windows(
        nn.utils.rnn.pad_sequence(pieces, batch_first=True), torch.tensor([len(piece) for piece in pieces]),
        labels[torch.from_numpy(numbers)], numbers, classes,
    )  # fmt: skip


def fold_of(name: str, recordings: Recordings, windows: Windows, train: Sequence[int], test: Sequence[int]) -> Fold:
    """A fold from the numbers of its recordings; the scales are those of the training recordings."""
    mean, deviation = scales(recordings.subset(list(train)))
    rows = [np.nonzero(np.isin(windows.recordings, list(part)))[0] for part in (train, test)]
    return Fold(name, rows[0], rows[1], mean, deviation)


def first_seed(seed: int, name: str) -> int:
    """The seed of a fold, the same whichever folds it is trained beside."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def train_folds(
    build: Callable[[], nn.Module], windows: Windows, folds: Sequence[Fold], training: Training, seed: int,
    device: torch.device, told: Callable[[int, int, float], None] | None = None,
) -> Outcome:  # fmt: skip
    """Train one model a fold, all at once, and test each on its test windows.

    Args:
        build: makes a model: ``model(source, padding_mask, classification_head_name=...)`` returns logits first.
        windows: all windows.
        folds: the folds, all to be trained together.
        training: the recipe.
        seed: of first weights, batches and dropout.
        device: where.
        told: called with the update's number, the number of updates and the mean loss, some 50 times.
    """
    held = replace(
        windows, values=windows.values.to(device), labels=windows.labels.to(device), lengths=windows.lengths.to(device)
    )
    apart = device.type == "cuda" and _leaves_room(build())
    groups = [[fold] for fold in folds] if apart else [list(folds)]
    mean_size = sum(len(fold.train) for fold in folds) / len(folds)
    updates = training.epochs * max(1, round(mean_size / training.batch_size))
    runs = [_Run(build, held, group, training, updates, seed, device) for group in groups]
    step = Branches([run.step for run in runs], device) if apart else runs[0].step
    losses, start = [], time.monotonic()
    for number in range(updates):
        for run in runs:
            run.feed(number)
        losses.append(step())
        if told and (number + 1) % max(1, updates // 50) == 0:
            told(number + 1, updates, float(losses[-1].mean()))
    taken = torch.stack(losses).cpu() if losses else torch.empty(0, len(folds))
    seconds = time.monotonic() - start
    probabilities = [found for run in runs for found in run.test()]
    return Outcome(probabilities, [model for run in runs for model in run.models()], taken, seconds)


def _leaves_room(model: nn.Module) -> bool:
    """Whether a model leaves most of a GPU idle, so that others may run beside it."""
    rkm = getattr(model, "rkm", None)
    if not isinstance(rkm, RKM):
        return False
    cell, dtype = resolve_cell(rkm.cell, rkm.feedback), next(rkm.parameters()).dtype
    alone = rkm.kernel == "linear" and leaves_room(rkm.backend, cell, rkm.hidden_size, dtype, rkm.layer_norm)
    return alone or not rkm.feedback


class _Run:
    """The state of :func:`train_folds` for folds of one model."""

    def __init__(
        self, build: Callable[[], nn.Module], windows: Windows, folds: Sequence[Fold], training: Training, updates: int,
        seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        self.folds, self.training, self.updates, self.device = folds, training, updates, device
        self.values, self.labels, self.lengths = windows.values, windows.labels, windows.lengths
        self.padded = windows.padded
        seeds = [first_seed(seed, fold.name) for fold in folds]
        models = [self._model(build, one) for one in seeds]
        self.base = copy.deepcopy(models[0])
        self.parameters, self.buffers = stack_module_state(models)
        self.mean, self.deviation = (
            torch.tensor(np.stack([getattr(fold, name) for fold in folds]), dtype=torch.float32, device=device)
            for name in ("mean", "deviation")
        )
        self.draws = [_in_turn(fold.train, one, training.batch_size) for fold, one in zip(folds, seeds, strict=True)]
        on_gpu = device.type == "cuda"
        # A graph reads these where they are.
        self.rows = torch.zeros(len(folds), training.batch_size, dtype=torch.int64, device=device)
        self.lr = torch.tensor(training.lr, device=device) if on_gpu else None
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), training.lr if self.lr is None else self.lr,
            weight_decay=training.weight_decay, fused=on_gpu or None, capturable=on_gpu,
        )  # fmt: skip
        torch.manual_seed(first_seed(seed, "dropout of " + folds[0].name))

    def _model(self, build: Callable[[], nn.Module], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build().to(self.device)

    def feed(self, number: int) -> None:
        """Draw the batches of an update, counted from 0, and set its learning rate."""
        self.rows.copy_(torch.from_numpy(np.stack([next(draw) for draw in self.draws])))
        lr = self.training.lr * (1 - number / self.updates)
        if self.lr is not None:
            self.lr.fill_(lr)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> Tensor:
        """One update of all folds; their losses, ``(folds,)``."""
        self.base.train()
        logits = self._logits(self.rows)
        losses = F.cross_entropy(logits.transpose(1, 2), self.labels[self.rows], reduction="none").mean(1)
        self.optimizer.zero_grad()
        losses.sum().backward()  # no fold's parameters are in another's loss
        self._clip()
        self.optimizer.step()
        return losses.detach()

    def _clip(self) -> None:
        """Bound the norm of each fold's gradient, as ``clip_grad_norm_`` does for a model."""
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        factors = (self.training.clip_norm / (norms + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factors.view(-1, *[1] * (grad.dim() - 1)))

    def _logits(self, rows: Tensor) -> Tensor:
        """``(folds, B, classes)`` for the windows ``rows`` ``(folds, B)``."""
        # A GPU would have to be waited for.
        trims = self.padded and self.device.type == "cpu"
        longest = int(self.lengths[rows].max()) if trims else self.values.size(1)
        x = (self.values[rows, :longest] - self.mean[:, None, None]) / self.deviation[:, None, None]
        mask = None
        if self.padded:
            mask = torch.arange(longest, device=self.device) >= self.lengths[rows].unsqueeze(-1)
        if len(self.folds) == 1:
            parameters, buffers = (
                {name: tensor[0] for name, tensor in held.items()} for held in (self.parameters, self.buffers)
            )
            alone: Tensor = self._call(parameters, buffers, x[0], None if mask is None else mask[0])
            return alone.unsqueeze(0)
        mapped = vmap(self._call, in_dims=(0, 0, 0, None if mask is None else 0), randomness="different")
        logits: Tensor = mapped(self.parameters, self.buffers, x, mask)
        return logits

    def _call(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, mask: Tensor | None
    ) -> Tensor:
        keywords = {"classification_head_name": HEAD}
        logits: Tensor = functional_call(self.base, (parameters, buffers), (x, mask), keywords)[0]
        return logits

    @torch.no_grad()
    def test(self) -> list[Tensor]:
        """The probabilities of each fold's test windows."""
        self.base.eval()
        longest = max(len(fold.test) for fold in self.folds)
        # Folds with fewer test windows are filled with their last one.
        rows = np.stack([np.pad(fold.test, (0, longest - len(fold.test)), mode="edge") for fold in self.folds])
        batches = torch.from_numpy(rows).to(self.device).split(EVALUATED_AT_A_TIME, dim=1)
        found = torch.cat([self._logits(batch).float().softmax(-1) for batch in batches], dim=1).cpu()
        return [probabilities[: len(fold.test)] for probabilities, fold in zip(found, self.folds, strict=True)]

    def models(self) -> list[dict[str, Tensor]]:
        """Each fold's parameters."""
        return [
            {name: tensor[number].detach().cpu().clone() for name, tensor in self.parameters.items()}
            for number in range(len(self.folds))
        ]


def _in_turn(rows: np.ndarray, seed: int, size: int) -> Iterator[np.ndarray]:
    """Batches of a fold's windows without end: all windows in a random order, then all in another."""
    draw = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, draw.permutation(rows)])
        yield left[:size]
        left = left[size:]
