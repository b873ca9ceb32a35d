"""fairseq models; importing this registers them."""

from fairseq_rkm.models import rkm, rkm_lm, rkm_lm_presets
from fairseq_rkm.models.rkm import RKMModel

__all__ = ["RKMModel", "rkm", "rkm_lm", "rkm_lm_presets"]
