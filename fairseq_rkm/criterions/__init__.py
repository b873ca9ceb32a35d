"""fairseq criterions; importing this registers them."""

import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.criterions import cross_entropy_ar_tar

__all__ = ["cross_entropy_ar_tar"]
