"""``rkm_lm`` and its presets: language models that carry their state along a text."""

from fairseq_rkm.models.language_model import language_model_presets
from fairseq_rkm.models.language_model.rkm_language_model import RKMLanguageModel, RKMLanguageModelConfig

__all__ = ["RKMLanguageModel", "RKMLanguageModelConfig", "language_model_presets"]
