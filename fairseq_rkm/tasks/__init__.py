"""fairseq tasks; importing this registers them."""

from fairseq_rkm.tasks import stateful_language_modeling

__all__ = ["stateful_language_modeling"]
