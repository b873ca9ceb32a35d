"""The place of a gate among the stacked ones: in weights, biases, pre-activations and their gradients."""

from fairseq_rkm.ops.cells import FORGET, INPUT, OUTPUT, Cell


def gate_slices(cell: Cell, size: int) -> dict[str, slice]:
    """Where each gate stands among the stacked ones."""
    return {gate: slice(i * size, (i + 1) * size) for i, gate in enumerate(cell.gates)}


def recurrent_slice(cell: Cell, size: int) -> slice:
    """The contiguous block of gates that see ``h_{t-1}``."""
    first = cell.gates.index(cell.recurrent_gates[0])
    return slice(first * size, (first + len(cell.recurrent_gates)) * size)


def gate_places(cell: Cell) -> dict[str, int]:
    """The numbers of the gates that a cell may lack, -1 for one that it lacks, as compiled kernels are told them."""
    return {gate.upper(): cell.gates.index(gate) if gate in cell.gates else -1 for gate in (INPUT, FORGET, OUTPUT)}
