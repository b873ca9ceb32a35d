"""fairseq optimizers; importing this registers them."""

from fairseq_rkm.optim import adamw_average, nt_asgd

__all__ = ["adamw_average", "nt_asgd"]
