"""Tasks; importing registers them with fairseq."""

import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq
from fairseq_rkm.tasks import signal_classification, stateful_language_modeling

__all__ = ["signal_classification", "stateful_language_modeling"]
