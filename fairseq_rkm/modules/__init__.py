"""Modules of plain PyTorch; nothing here knows of fairseq."""

from fairseq_rkm.modules.attention import GlobalAttention
from fairseq_rkm.modules.dropout import LockedDropout, dropped_embedding
from fairseq_rkm.modules.pooling import POOLINGS, AttentionPooling, log_power, outside_parts, pool
from fairseq_rkm.modules.rkm import RKM
from fairseq_rkm.modules.state import RKMState
from fairseq_rkm.modules.stepping import Stepper

__all__ = [
    "POOLINGS", "RKM", "AttentionPooling", "GlobalAttention", "LockedDropout", "RKMState", "Stepper",
    "dropped_embedding", "log_power", "outside_parts", "pool",
]  # fmt: skip
