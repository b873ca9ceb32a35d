"""``rkm`` and its presets: encoder-decoder models with attention."""

from fairseq_rkm.models.translation import translation_presets
from fairseq_rkm.models.translation.rkm_model import RKMConfig, RKMModel

__all__ = ["RKMConfig", "RKMModel", "translation_presets"]
