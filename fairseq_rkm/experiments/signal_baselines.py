"""Baselines on the same windows and folds: ridge regression on log band power, MiniRocket, 1-NN DTW, an LSTM."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from fairseq_rkm.errors import RKMError
from fairseq_rkm.experiments.signal_folds import Fold, Windows

BANDS = (1.0, 4.0, 8.0, 13.0, 30.0, 45.0)
"""The edges, in hertz, of the EEG's bands: delta, theta, alpha, beta, gamma."""
PENALTIES = np.logspace(-2, 4, 13)
PLAIN_SIZE = 64


def labels_of(windows: Windows, rows: np.ndarray) -> np.ndarray:
    """The classes of windows, from 0."""
    return windows.labels[torch.from_numpy(rows)].numpy()


def log_band_powers(windows: Windows, rate: float | None) -> np.ndarray:
    """The log of the power in each band and channel, ``(windows, bands * channels)`` float64.

    Bands are :data:`BANDS` below half of the sampling rate. Without a rate, or below 20 Hz, they are five bands of
    equal width on a scale of logarithms from the lowest frequency to the highest.
    """
    rows = []
    for values, length in zip(windows.values.numpy(), windows.lengths.tolist(), strict=True):
        signal = values[:length] - values[:length].mean(0)
        power = np.square(np.abs(np.fft.rfft(signal * np.hanning(length + 2)[1:-1, None], axis=0)))
        frequencies = np.fft.rfftfreq(length, 1 / (rate or 1.0))
        bands = [power[(low <= frequencies) & (frequencies < high)] for low, high in _edges(rate, length)]
        # A short window may have no frequency in a band: it then says nothing.
        means = [band.mean(0) if len(band) else np.zeros(signal.shape[1]) for band in bands]
        rows.append(np.log(np.array(means) + 1e-12).ravel())
    return np.array(rows)


def _edges(rate: float | None, length: int) -> list[tuple[float, float]]:
    nyquist = (rate or 1.0) / 2
    edges = [edge for edge in BANDS if rate is not None and edge < nyquist]
    if len(edges) < 3:
        edges = np.geomspace(2 * nyquist / max(length, 4), 1.001 * nyquist, 6).tolist()
    return list(itertools.pairwise(edges))


def band_power(windows: Windows, folds: list[Fold], rate: float | None) -> list[Tensor]:
    """Ridge regression on log band powers; the penalty has the least error in leave-one-out of the training part."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = log_band_powers(windows, rate)
    return [
        _one_hot(
            make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
            .fit(features[fold.train], labels_of(windows, fold.train))
            .predict(features[fold.test]),
            len(windows.classes),
        )
        for fold in folds
    ]


def minirocket(windows: Windows, folds: list[Fold], _rate: float | None) -> list[Tensor]:
    """MiniRocket and ridge regression, as aeon has them (Dempster et al. 2021).

    Raises:
        RKMError: aeon is not installed.
    """
    try:
        from aeon.classification.convolution_based import MiniRocketClassifier
    except ImportError:
        raise RKMError("MiniRocket is in aeon, which is not installed: pip install aeon") from None
    return _with_aeon(windows, folds, lambda seed: MiniRocketClassifier(random_state=seed))


def dtw(windows: Windows, folds: list[Fold], _rate: float | None) -> list[Tensor]:
    """The nearest neighbour by dynamic time warping within a tenth of the window, as aeon has it.

    Raises:
        RKMError: aeon is not installed.
    """
    try:
        from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier
    except ImportError:
        raise RKMError("1-NN DTW is in aeon, which is not installed: pip install aeon") from None
    return _with_aeon(
        windows, folds,
        lambda _seed: KNeighborsTimeSeriesClassifier(distance="dtw", distance_params={"window": 0.1}, n_neighbors=1),
    )  # fmt: skip


def _with_aeon(windows: Windows, folds: list[Fold], make: Callable[[int], object]) -> list[Tensor]:
    """Fit a classifier of aeon on each fold; windows of different lengths end in zeros, standardized."""
    found = []
    for number, fold in enumerate(folds, 1):
        real = torch.arange(windows.values.size(1)) < windows.lengths.unsqueeze(1)
        x = (windows.values - torch.from_numpy(fold.mean)) / torch.from_numpy(fold.deviation)
        series = (x * real.unsqueeze(-1)).transpose(1, 2).numpy()
        classifier = make(number)
        classifier.fit(series[fold.train], labels_of(windows, fold.train))  # type: ignore[attr-defined]
        found.append(_one_hot(classifier.predict(series[fold.test]), len(windows.classes)))  # type: ignore[attr-defined]
    return found


def _one_hot(predicted: np.ndarray, classes: int) -> Tensor:
    """Certain probabilities of predicted classes."""
    return torch.nn.functional.one_hot(torch.from_numpy(np.asarray(predicted, dtype=np.int64)), classes).float()


BASELINE_FUNCTIONS: dict[str, Callable[[Windows, list[Fold], float | None], list[Tensor]]] = {
    "band_power": band_power, "minirocket": minirocket, "dtw": dtw,
}  # fmt: skip


class PlainLSTM(nn.Module):
    """``torch.nn.LSTM``, mean over the window, linear layer; no dropout, no noise."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, PLAIN_SIZE, batch_first=True)
        self.output = nn.Linear(PLAIN_SIZE, classes)

    def forward(
        self, source: Tensor, padding_mask: Tensor | None = None, classification_head_name: str | None = None
    ) -> tuple[Tensor, dict]:
        """Logits, ``(B, classes)``, of windows ``(B, T, channels)``, padded on the right."""
        output, _ = self.lstm(source)
        if padding_mask is None:
            return self.output(output.mean(1)), {}
        real = ~padding_mask.unsqueeze(-1)
        return self.output((output * real).sum(1) / real.sum(1)), {}
