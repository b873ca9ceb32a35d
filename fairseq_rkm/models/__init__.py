"""fairseq models; importing this registers them."""

import fairseq_rkm.quiet_fairseq  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.models import rkm, rkm_classifier, rkm_lm, rkm_lm_presets
from fairseq_rkm.models.rkm import RKMModel
from fairseq_rkm.models.rkm_classifier import RKMClassifier

__all__ = ["RKMClassifier", "RKMModel", "rkm", "rkm_classifier", "rkm_lm", "rkm_lm_presets"]
