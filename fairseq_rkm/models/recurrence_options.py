"""The flags that all RKM models share, and the module built from them."""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass

from fairseq_rkm.models.machine_memory import check_machine_memory
from fairseq_rkm.modules import RKM
from fairseq_rkm.modules.parameters import NGRAM_PADDINGS
from fairseq_rkm.ops import BACKENDS, CELLS, resolve_cell
from fairseq_rkm.ops.kernel_functions import KERNELS

CELL_CHOICES = ChoiceEnum(list(CELLS))
KERNEL_CHOICES = ChoiceEnum(list(KERNELS))
NGRAM_PADDING_CHOICES = ChoiceEnum(list(NGRAM_PADDINGS))
BACKEND_CHOICES = ChoiceEnum(["auto", *BACKENDS])

NO_LIMIT = 10**9
"""The most positions of a recurrence: no limit."""


@dataclass
class RKMOptions(FairseqDataclass):
    """The flags of a recurrence and its backend."""

    cell: CELL_CHOICES = field(default="rkm_lstm", metadata={"help": "recurrent cell"})
    kernel: KERNEL_CHOICES = field(
        default="linear", metadata={"help": "kernel through which the candidate's filters meet the inputs and h_{t-1}"}
    )
    kernel_degree: Optional[int] = field(
        default=None, metadata={"help": "degree of polynomial (from 1; default: 2) or arccos (0 or 1; default: 1)"}
    )
    kernel_scale: Optional[float] = field(
        default=None,
        metadata={
            "help": "where s of polynomial and gaussian starts; default: 1, and for gaussian the typical length of "
            "what it sees, for words when they start from random vectors"
        },
    )
    kernel_offset: Optional[float] = field(
        default=None, metadata={"help": "where b of polynomial starts, at least 0; default: 1"}
    )
    fixed_kernel: bool = field(default=False, metadata={"help": "do not learn s and b"})
    ngram: int = field(default=1, metadata={"help": "number of inputs that a step sees"})
    ngram_padding: NGRAM_PADDING_CHOICES = field(
        default="causal", metadata={"help": "whether an n-gram ends at its step or is centred there"}
    )
    no_feedback: bool = field(
        default=False, metadata={"help": "gates see the inputs alone, so that time runs in parallel"}
    )
    layer_norm: bool = field(default=False, metadata={"help": "layer normalisation of the memory"})
    memory_clip: Optional[str] = field(
        default="auto",
        metadata={
            "help": "auto, none or the magnitude to which the memory is clipped at each step; auto is 1 for a memory "
            "that is fed back with no squashing, --layer-norm or bounded --kernel to bound it, else none"
        },
    )
    sigma_i2: float = field(default=0.5, metadata={"help": "constant input scale, within (0, 1)"})
    sigma_f2: float = field(default=0.5, metadata={"help": "constant memory scale, within (0, 1)"})
    learn_sigma: bool = field(default=False, metadata={"help": "learn the constant scales"})
    learn_initial_state: bool = field(
        default=False, metadata={"help": "learn the state that sequences start from, in place of zeros"}
    )
    forget_bias: float = field(default=1.0, metadata={"help": "initial bias of the forget gate"})
    uniform_forget_bias: bool = field(
        default=False, metadata={"help": "draw the forget gate's initial bias as the other gates' (AWD-LSTM)"}
    )
    backend: BACKEND_CHOICES = field(default="auto", metadata={"help": "how to compute the recurrence"})


def build_rkm(
    options: RKMOptions, input_size: int, hidden_size: int, kind: type[RKM] = RKM, deviation: float | None = None,
    **arguments: Any,
) -> RKM:  # fmt: skip
    """Build an RKM of these sizes from the flags.

    Args:
        options: the flags.
        input_size: m.
        hidden_size: d.
        kind: the class to build.
        deviation: the standard deviation of the inputs' features at the start; a Gaussian's s starts there.
        arguments: arguments of :class:`~fairseq_rkm.modules.RKM`; they override the flags.

    Raises:
        RKMError: this machine's memory does not hold the weights, or the module refuses an argument.
    """
    flags = {
        "cell": str(options.cell),
        "kernel": str(options.kernel),
        "kernel_degree": options.kernel_degree,
        "kernel_scale": options.kernel_scale,
        "kernel_offset": options.kernel_offset,
        "learn_kernel": not options.fixed_kernel,
        "ngram": options.ngram,
        "ngram_padding": str(options.ngram_padding),
        "feedback": False if options.no_feedback else None,
        "layer_norm": options.layer_norm,
        "memory_clip": options.memory_clip,
        "sigma_i2": options.sigma_i2,
        "sigma_f2": options.sigma_f2,
        "learn_sigma": options.learn_sigma,
        "learn_initial_state": options.learn_initial_state,
        "forget_bias": None if options.uniform_forget_bias else options.forget_bias,
        "backend": str(options.backend),
    }
    arguments = {**flags, **arguments}
    if deviation is not None and arguments["kernel"] == "gaussian" and arguments["kernel_scale"] is None:
        arguments["kernel_scale"] = max(1.0, deviation * math.sqrt(arguments["ngram"] * input_size))
    check_machine_memory(
        _count_weights(input_size, hidden_size, **arguments),
        f"the recurrent weights of {hidden_size:,} units with {input_size:,} inputs of {arguments['ngram']:,} steps",
    )
    return kind(input_size, hidden_size, **arguments)


def _count_weights(
    input_size: int, hidden_size: int, cell: str, ngram: int, feedback: Any = None, num_layers: int = 1,
    bidirectional: bool = False, **_others: Any,
) -> int:  # fmt: skip
    """The number of weights in the matrices of the module with these arguments."""
    resolved, directions = resolve_cell(cell, feedback), 2 if bidirectional else 1
    gates, recurrent = len(resolved.gates), len(resolved.recurrent_gates) if resolved.has_feedback else 0
    inputs = ngram * (input_size + (num_layers - 1) * hidden_size * directions)
    return directions * hidden_size * (gates * inputs + num_layers * recurrent * hidden_size)


def first_given(value: Any, default: Any) -> Any:
    """A flag's value, or the default if it is None."""
    return default if value is None else value
