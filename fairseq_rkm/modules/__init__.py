"""Modules of plain PyTorch; nothing here knows of fairseq."""

from fairseq_rkm.modules.dropout import LockedDropout, dropped_embedding
from fairseq_rkm.modules.pooling import POOLINGS, pool
from fairseq_rkm.modules.rkm import RKM, RKMState

__all__ = ["POOLINGS", "RKM", "LockedDropout", "RKMState", "dropped_embedding", "pool"]
