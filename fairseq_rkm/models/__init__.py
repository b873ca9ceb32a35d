"""fairseq models; importing this registers them."""

import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.models import rkm, rkm_classifier, rkm_lm, rkm_lm_presets
from fairseq_rkm.models.rkm import RKMModel
from fairseq_rkm.models.rkm_classifier import RKMClassifier
from fairseq_rkm.models.rkm_lm import RKMLanguageModel

__all__ = ["RKMClassifier", "RKMLanguageModel", "RKMModel", "rkm", "rkm_classifier", "rkm_lm", "rkm_lm_presets"]
