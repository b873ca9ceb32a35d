"""fairseq models; importing this registers them."""

import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.models.classification import RKMClassifier
from fairseq_rkm.models.language_model import RKMLanguageModel
from fairseq_rkm.models.signals import RKMSignalClassifier
from fairseq_rkm.models.translation import RKMModel

__all__ = ["RKMClassifier", "RKMLanguageModel", "RKMModel", "RKMSignalClassifier"]
