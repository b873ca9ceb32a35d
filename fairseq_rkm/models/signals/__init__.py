"""``rkm_signal_classifier``: classifiers of multichannel time series."""

from fairseq_rkm.models.signals.rkm_signal_classifier import RKMSignalClassifier, RKMSignalClassifierConfig
from fairseq_rkm.models.signals.signal_estimator import SignalEstimator

__all__ = ["RKMSignalClassifier", "RKMSignalClassifierConfig", "SignalEstimator"]
