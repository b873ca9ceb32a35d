"""Tasks; importing registers them with fairseq."""

from fairseq_rkm.tasks import stateful_language_modeling

__all__ = ["stateful_language_modeling"]
