"""fairseq optimizers; importing this registers them."""

import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.optim import adamw_average, nt_asgd

__all__ = ["adamw_average", "nt_asgd"]
