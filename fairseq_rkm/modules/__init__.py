"""Modules of plain PyTorch; nothing here knows of fairseq."""

from fairseq_rkm.modules.attention import GlobalAttention
from fairseq_rkm.modules.dropout import LockedDropout, dropped_embedding
from fairseq_rkm.modules.rkm import RKM, RKMState

__all__ = ["RKM", "GlobalAttention", "LockedDropout", "RKMState", "dropped_embedding"]
