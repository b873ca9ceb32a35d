"""The place of a gate in the stacked weights, biases, pre-activations and their gradients."""

from fairseq_rkm.ops.cells import FORGET, INPUT, OUTPUT, Cell


def gate_slices(cell: Cell, size: int) -> dict[str, slice]:
    """The slice of each gate in the stack."""
    return {gate: slice(i * size, (i + 1) * size) for i, gate in enumerate(cell.gates)}


def recurrent_slice(cell: Cell, size: int) -> slice:
    """The slice of the gates that see ``h_{t-1}``: they stand together."""
    first = cell.gates.index(cell.recurrent_gates[0])
    return slice(first * size, (first + len(cell.recurrent_gates)) * size)


def gate_places(cell: Cell) -> dict[str, int]:
    """The numbers of the optional gates, for compiled kernels; -1 stands for a gate that the cell lacks."""
    return {gate.upper(): cell.gates.index(gate) if gate in cell.gates else -1 for gate in (INPUT, FORGET, OUTPUT)}
