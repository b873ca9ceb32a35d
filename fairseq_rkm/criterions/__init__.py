"""fairseq criterions; importing this registers them."""

from fairseq_rkm.criterions import cross_entropy_ar_tar

__all__ = ["cross_entropy_ar_tar"]
