"""A trained classifier of signals as an estimator of scikit-learn, for its and aeon's tools of evaluation."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin

from fairseq_rkm.errors import RKMError
from fairseq_rkm.models.signals.rkm_signal_classifier import RKMSignalClassifier
from fairseq_rkm.models.signals.signal_hub import SignalHubInterface


class SignalEstimator(ClassifierMixin, BaseEstimator):
    """A trained ``rkm_signal_classifier`` with ``predict``, ``predict_proba`` and ``score``.

    It is trained already: ``fit`` checks its arguments and changes nothing, as of scikit-learn's ``FrozenEstimator``,
    and ``clone`` returns the same estimator.

    >>> estimator = SignalEstimator("runs/signals/run")
    >>> estimator.score(x, y)  # x: (recordings, channels, time), y: (recordings,)

    Args:
        model: the folder of the checkpoint, or what ``RKMSignalClassifier.from_pretrained`` returns.
        checkpoint_file: the checkpoint's name.
        data: the folder of the prepared data, as ``from_pretrained`` takes it.
        batch_size: the most windows at a time.

    Raises:
        RKMError: the checkpoint cannot be used.
    """

    def __init__(
        self, model: Any, checkpoint_file: str = "checkpoint_best.pt", data: str | None = None, batch_size: int = 64
    ) -> None:
        self.model, self.checkpoint_file, self.data, self.batch_size = model, checkpoint_file, data, batch_size
        given = isinstance(model, SignalHubInterface)
        self.hub_ = model if given else RKMSignalClassifier.from_pretrained(model, checkpoint_file, data)

    @property
    def classes_(self) -> np.ndarray:
        """The classes' names, in the order of ``predict_proba``'s columns."""
        return np.array(self.hub_.classes)

    def fit(self, x: Any, y: Any) -> "SignalEstimator":
        """Check that the model can classify recordings, and that it knows their classes; it is not trained.

        Raises:
            RKMError: the recordings do not fit the model, or a class is unknown.
        """
        self.predict_proba(x[:1])
        unknown = sorted({str(label) for label in y} - set(self.hub_.classes))
        if unknown:
            raise RKMError(f"the model knows the classes {', '.join(self.hub_.classes)}, and not {', '.join(unknown)}")
        return self

    def predict(self, x: Any) -> np.ndarray:
        """Each recording's class, ``(recordings,)`` text."""
        return self.classes_[self.predict_proba(x).argmax(1)]

    def predict_proba(self, x: Any) -> np.ndarray:
        """Each recording's probabilities, ``(recordings, classes)`` float32.

        Raises:
            RKMError: the recordings do not fit the model.
        """
        return self.hub_.probabilities(x, self.batch_size).numpy()

    def score(self, x: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy. Classes are compared as text, so that numbers will do."""
        return float(super().score(x, np.array([str(label) for label in y]), sample_weight))

    def __sklearn_clone__(self) -> "SignalEstimator":
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True
