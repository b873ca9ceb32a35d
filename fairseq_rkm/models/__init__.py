"""fairseq models; importing this registers them."""

from fairseq_rkm.models import rkm, rkm_lm, rkm_lm_presets

__all__ = ["rkm", "rkm_lm", "rkm_lm_presets"]
