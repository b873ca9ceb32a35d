"""fairseq tasks; importing this registers them."""

from fairseq_rkm.tasks import sentence_prediction_checks, stateful_language_modeling

__all__ = ["sentence_prediction_checks", "stateful_language_modeling"]
