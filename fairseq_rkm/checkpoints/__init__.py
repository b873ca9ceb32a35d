"""Checkpoints and model archives, read as data that a stranger may have made.

:func:`~fairseq_rkm.checkpoints.reading.load` takes the place of ``torch.load``. It inspects a file before it takes
memory for the file's tensors, and inspects the contents before fairseq sees them. ``docs/checkpoints.md`` lists the
files that are refused.
"""

from fairseq_rkm.checkpoints.reading import load

__all__ = ["load"]
