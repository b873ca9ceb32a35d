"""The cells of Liang et al. (2019), stated once, as data.

Every backend, model flag and test reads this table; none repeats it.

With pre-activations ``a^g_t = W^g X_t + U^g h_{t-1} + b^g`` a cell is::

    candidate     c~_t = squash(a^candidate_t), with a^candidate_t = k(w, z_t) + b for a kernel that is not linear
    memory        c_t  = i_t * c~_t + f_t * c_{t-1}
    output        h_t  = o_t * squash(c_t)

Each of ``i_t``, ``f_t`` and ``o_t`` is a gate (a sigmoid), the complement of another gate, a constant, or absent.
"""

import functools
import math
from dataclasses import dataclass, field, replace

from fairseq_rkm.errors import RKMError
from fairseq_rkm.ops.kernel_functions import LINEAR, Kernel, kernel_of_key

CANDIDATE, INPUT, FORGET, OUTPUT = "candidate", "input", "forget", "output"

ALONE = "_memory"
"""The end of the name of a cell that is another's memory alone."""
AUTO_CLIP = 1.0
"""The bound of ``memory_clip="auto"`` for a memory without another bound; a tanh has the same."""


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: the name that users type.
        title: the paper's name.
        gates: the pre-activations, in the order of their stacked weights. The candidate comes first and the output gate
            last. The gates that act on the memory, the sigmoids, and the recurrent gates then each form one block.
        recurrent_gates: the gates that see ``h_{t-1}``; empty for a cell without feedback.
        has_memory: whether ``c_{t-1}`` enters ``c_t``.
        squash_candidate: whether ``c~_t`` passes through tanh.
        squash_output: whether ``c_t`` passes through tanh on its way to the output.
        source: the publication and section of the equation.
        clip: the largest ``|c_t|``; the memory is clipped to it. None is no limit, as in the paper.
        kernel: k of the candidate. A cell that squashes its candidate squashes the kernel's value.
        key: the cell as a word; :func:`cell_of_key` reads it.
        memory_alone: the cell whose output is this one's memory: no output gate, no squashing, no feedback. It takes
            the candidate as it is, whatever its kernel.
    """

    name: str
    title: str
    gates: tuple[str, ...]
    recurrent_gates: tuple[str, ...]
    has_memory: bool = True
    squash_candidate: bool = False
    squash_output: bool = False
    source: str = "Liang et al. 2019, section 4"
    clip: float | None = None
    kernel: Kernel = LINEAR
    key: str = field(init=False, compare=False, repr=False)
    memory_alone: "Cell" = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Made here: torch.compile makes variables of numbers that it meets, and no text of variables.
        kernel = "" if self.kernel.is_linear else f"/{self.kernel.key}"
        object.__setattr__(self, "key", f"{self.name}/{self.has_feedback:d}/{self.clip}{kernel}")
        object.__setattr__(self, "memory_alone", self if self.name.endswith(ALONE) else self._memory_alone())

    def _memory_alone(self) -> "Cell":
        gates = tuple(gate for gate in self.gates if gate != OUTPUT)
        name = self.name + ALONE
        return replace(self, name=name, gates=gates, recurrent_gates=(), squash_output=False, kernel=LINEAR)

    def __hash__(self) -> int:
        return hash(self.key)  # every call looks up plans and kernels by their cell: others must not meet it

    @property
    def has_feedback(self) -> bool:
        return bool(self.recurrent_gates)

    @property
    def feeds_back_unbounded(self) -> bool:
        """Whether ``c_t`` may grow exponentially: ``h_{t-1}`` enters it and grows with ``c_{t-1}``.

        Without feedback, ``f_t < 1`` keeps ``c_t`` in proportion to the candidates. A kernel that is bounded lets
        ``h_{t-1}`` into ``c_t`` no farther than its bound.
        """
        return self.has_feedback and not self.squash_output and self.kernel.bound is None

    @property
    def input_is_gate(self) -> bool:
        """``i_t = eta_t``."""
        return INPUT in self.gates

    @property
    def forget_is_gate(self) -> bool:
        """``f_t`` is a sigmoid; otherwise the constant ``sigma_f^2``, or absent without memory."""
        return FORGET in self.gates

    @property
    def input_is_complement(self) -> bool:
        """``i_t = 1 - f_t`` (coupled input and forget gates)."""
        return self.forget_is_gate and not self.input_is_gate

    @property
    def input_is_constant(self) -> bool:
        """``i_t = sigma_i^2``."""
        return not self.input_is_gate and not self.forget_is_gate

    @property
    def forget_is_constant(self) -> bool:
        """``f_t = sigma_f^2``."""
        return self.has_memory and not self.forget_is_gate

    @property
    def output_is_gate(self) -> bool:
        return OUTPUT in self.gates

    @functools.cache  # noqa: B019 - there are few cells, and each single step asks
    def without_feedback(self) -> "Cell":
        """The same cell with ``U`` dropped: its gates see ``X_t`` alone."""
        return replace(self, recurrent_gates=())

    def clipped(self, clip: float | None) -> "Cell":
        """The same cell with ``c_t <- min(max(c_t, -clip), clip)`` (Sak et al. 2014); this bounds the feedback."""
        return replace(self, clip=None if clip is None else float(clip))

    def through(self, kernel: Kernel) -> "Cell":
        """The same cell with another kernel in its candidate."""
        return replace(self, kernel=kernel)

    def equations(self) -> tuple[str, str]:
        """The memory's and the output's equation, as the README prints them."""
        candidate = "tanh(c~_t)" if self.squash_candidate else "c~_t"
        scale = "i_t" if self.input_is_gate else "(1 - f_t)" if self.input_is_complement else "s_i"
        memory = f"{scale} {candidate}"
        if self.has_memory:
            memory += " + f_t c_{t-1}" if self.forget_is_gate else " + s_f c_{t-1}"
        squashed = "tanh(c_t)" if self.squash_output else "c_t"
        return memory, f"o_t {squashed}" if self.output_is_gate else squashed


_ALL = (CANDIDATE, INPUT, FORGET, OUTPUT)

CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("lstm", "LSTM", _ALL, _ALL, squash_candidate=True, squash_output=True, source="Gers et al. 2000"),
        Cell("rkm_lstm", "RKM-LSTM", _ALL, _ALL),
        Cell("rkm_cifg", "RKM-CIFG", (CANDIDATE, FORGET, OUTPUT), (CANDIDATE, FORGET, OUTPUT)),
        Cell("linear_kernel_gated", "Linear Kernel w/ o_t", (CANDIDATE, OUTPUT), (CANDIDATE, OUTPUT)),
        Cell("linear_kernel", "Linear Kernel", (CANDIDATE,), (CANDIDATE,), squash_output=True),
        Cell("gated_cnn", "Gated CNN", (CANDIDATE, OUTPUT), (), has_memory=False),
        Cell("cnn", "CNN", (CANDIDATE,), (), has_memory=False, squash_output=True),
        Cell("ran", "RAN", (CANDIDATE, INPUT, FORGET), (INPUT, FORGET), squash_output=True, source="Lee et al. 2017"),
    )
}


def is_bound(memory_clip: str | float | None) -> bool:
    """Whether a setting names a bound of its own."""
    return memory_clip not in ("auto", "none", None)


def resolve_clip(memory_clip: str | float | None, cell: Cell, layer_norm: bool) -> float | None:
    """The largest ``|c_t|`` for a cell and a setting; None for no limit.

    Args:
        memory_clip: a number, also as text; ``"none"`` or None for no limit; or ``"auto"``. ``"auto"`` is
            :data:`AUTO_CLIP` for a cell that feeds back a memory without squashing, layer normalisation or a bounded
            kernel, and no limit for the others.
        cell: the cell, with or without feedback.
        layer_norm: whether the memory is normalised.

    Raises:
        RKMError: the setting is anything else, or a number beside layer normalisation.
    """
    if memory_clip == "auto":
        return AUTO_CLIP if cell.feeds_back_unbounded and not layer_norm else None
    if memory_clip is None or memory_clip == "none":
        return None
    try:
        clip = math.nan if isinstance(memory_clip, bool) else float(memory_clip)
    except (TypeError, ValueError):
        clip = math.nan
    if not 0 < clip < math.inf:
        raise RKMError(f"memory_clip must be 'auto', 'none' (None) or a number above 0 and finite, not {memory_clip!r}")
    if layer_norm:
        raise RKMError("memory_clip and layer_norm both bound the memory: choose one")
    return clip


def resolve_cell(name: str, feedback: bool | None = None) -> Cell:
    """The cell called ``name``, with or without feedback.

    Args:
        name: a key of :data:`CELLS`.
        feedback: None keeps the feedback of the cell's row; False drops it.

    Raises:
        RKMError: the name is unknown, or feedback is asked of a cell that has none.
    """
    if name not in CELLS:
        raise RKMError(f"unknown cell {name!r}; choose one of {', '.join(CELLS)}")
    cell = CELLS[name]
    if feedback and not cell.has_feedback:
        raise RKMError(f"the cell {name!r} has no feedback; leave feedback at None or False")
    return cell.without_feedback() if feedback is False else cell


@functools.cache
def cell_of_key(key: str) -> Cell:
    """The cell whose :attr:`Cell.key` this is; operators name their cell so.

    Raises:
        RKMError: it is no cell's.
    """
    try:
        name, feedback, clip, *kernel = key.split("/")
        alone = name.endswith(ALONE)
        cell = resolve_cell(name.removesuffix(ALONE), None if int(feedback) or alone else False)
        cell = cell.memory_alone if alone else cell
        cell = cell.clipped(None if clip == "None" else float(clip))
        return cell.through(kernel_of_key(*kernel)) if kernel else cell
    except ValueError as error:
        known = "it must be NAME/FEEDBACK/CLIP, as in rkm_lstm/1/1.0, or end in /KERNEL, as in rkm_lstm/1/1.0/gaussian"
        raise RKMError(f"{key!r} names no cell: {known}") from error
