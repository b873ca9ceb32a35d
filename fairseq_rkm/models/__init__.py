"""fairseq models; importing this registers them."""

from fairseq_rkm.models import rkm_lm

__all__ = ["rkm_lm"]
