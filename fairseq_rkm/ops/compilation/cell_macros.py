"""A row of :mod:`fairseq_rkm.ops.cells` as macros of C, for compiled kernels."""

from fairseq_rkm.ops.cells import Cell
from fairseq_rkm.ops.gate_layout import gate_places


def cell_macros(cell: Cell) -> dict[str, int | str]:
    """The macros of a cell: names and values to define."""
    return {
        "GATES": len(cell.gates),
        "RECURRENT": len(cell.recurrent_gates),
        "FIRST_RECURRENT": cell.gates.index(cell.recurrent_gates[0]) if cell.has_feedback else 0,
        **gate_places(cell),
        "HAS_MEMORY": int(cell.has_memory),
        "SQUASH_CANDIDATE": int(cell.squash_candidate),
        "SQUASH_OUTPUT": int(cell.squash_output),
        **({} if cell.clip is None else {"CLIP": f"{cell.clip!r}f"}),
    }
