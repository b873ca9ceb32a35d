"""fairseq models; importing this registers them."""

from fairseq_rkm.models import rkm_lm
from fairseq_rkm.models.rkm_classifier import RKMClassifier

__all__ = ["RKMClassifier", "rkm_lm"]
