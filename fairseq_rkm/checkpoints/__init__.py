"""Checkpoints and model archives, read as data that a stranger may have made.

:func:`~fairseq_rkm.checkpoints.reading.load` takes ``torch.load``'s place: it inspects a file before it takes memory
for it, and its contents before fairseq sees them. ``docs/checkpoints.md`` says what is refused.
"""

from fairseq_rkm.checkpoints.reading import load

__all__ = ["load"]
