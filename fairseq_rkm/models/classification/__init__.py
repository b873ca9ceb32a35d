"""``rkm_classifier``: classifiers of documents."""

from fairseq_rkm.models.classification.rkm_classifier import RKMClassifier, RKMClassifierConfig

__all__ = ["RKMClassifier", "RKMClassifierConfig"]
