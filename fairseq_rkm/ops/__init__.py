"""The recurrences as pure functions of tensors; nothing here knows of modules or of fairseq."""

from fairseq_rkm.ops.cells import CELLS, Cell, resolve_cell
from fairseq_rkm.ops.dispatch import BACKENDS, recurrence
from fairseq_rkm.ops.weights import Weights, memory_dtype

__all__ = ["BACKENDS", "CELLS", "Cell", "Weights", "memory_dtype", "recurrence", "resolve_cell"]
