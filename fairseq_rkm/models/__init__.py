"""fairseq models; importing this registers them."""

from fairseq_rkm.models import rkm_lm, rkm_lm_presets

__all__ = ["rkm_lm", "rkm_lm_presets"]
