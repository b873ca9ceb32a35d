"""A user's mistake ends fairseq's commands with one sentence in place of a stack trace.

Unknown flags, flags that do not go together, short memory and diverged training end in one sentence, too.
"""

import os
import re
import sys
import types

import hydra.errors
import omegaconf
import yaml

from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches import interruptions, meetings
from fairseq_rkm.fairseq_patches.commands import in_fairseq_command
from fairseq_rkm.fairseq_patches.data_parallel import without_fairscale
from fairseq_rkm.fairseq_patches.registry import setting

DOCUMENTS = "--task sentence_prediction --criterion sentence_prediction --arch rkm_classifier"
"""Flags that classify documents: each of the three components reads flags of the others."""

SIGNALS = "--task signal_classification --criterion sentence_prediction --arch rkm_signal_classifier"
"""Flags that classify signals."""

COMPONENTS_KEY = re.compile(r"key '(task|model|criterion)\.")
"""An interpolation of a component that takes another's flag, in omegaconf's words."""

CONFIGURATION = (
    omegaconf.errors.ValidationError,
    omegaconf.errors.ConfigKeyError,
    omegaconf.errors.InterpolationResolutionError,
)
"""omegaconf's errors about one key of a configuration."""

DIVERGED = (
    "training has diverged: gradients are not finite. Lower --lr, warm it up, or give --clip-norm; cells that feed "
    "back an output which is not squashed (rkm_lstm, rkm_cifg, linear_kernel_gated) need a bounded memory as well: "
    "--memory-clip auto (the default, which is --memory-clip 1 for these) or --layer-norm"
)


MEMORY = (
    "out of memory ({}): give fewer sentences or tokens at a time (--batch-size, --max-tokens, --tokens-per-sample), a "
    "smaller model, or fewer --num-workers. Checkpoints written before are whole, and the same command goes on from "
    "the last one"
)

OTHER_WEIGHTS = (
    "the checkpoint's optimizer has other weights than this run, though the models agree: give the flags that it was "
    "trained with (--past-decode has a bias to train), or --reset-optimizer"
)

NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|MemoryError|killed by signal: Killed"
)
"""Words of PyTorch, Python and the operating system in errors of short memory."""


@setting(
    "sys.excepthook",
    why="a user's mistake ends fairseq's commands in a stack trace, and hydra prints errors itself",
    until="fairseq prints its users' mistakes in a sentence",
)
def sentences_for_mistakes() -> None:
    """Print errors by :func:`print_error` in fairseq's commands. Tell hydra to leave errors alone."""
    if in_fairseq_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = print_error
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")


def print_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print one sentence for a user's mistake, and the stack trace for any other error.

    It takes the place of ``sys.excepthook``, and has its arguments.

    Raises:
        SystemExit: this process received a signal, whose status it ends with.
    """
    if interruptions.received:
        # The user knows of the signal already. Later errors come from the process's end.
        raise SystemExit(128 + interruptions.received[0])
    sentence = sentence_of(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"fairseq-rkm: error: {sentence}", file=sys.stderr)


def sentence_of(error: BaseException | None) -> str | None:
    """Return the sentence for the user's mistake behind an error.

    fairseq wraps some errors in others, and so do its worker processes: the whole chain of causes is searched.

    Args:
        error: any error, or None.

    Returns:
        The sentence; None if no error of the chain is a user's mistake.
    """
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        # A worker's error comes with the text of its stack trace, in the message of an error of the same type.
        in_worker = re.search(rf"({RKMError.__module__}.{RKMError.__name__}|FloatingPointError): (.*)", str(link))
        if in_worker:
            return _advised(in_worker[2])
        if isinstance(link, RKMError):
            return str(link)
        if "Please install fairscale" in str(link):
            return without_fairscale("fully_sharded" if "FullySharded" in str(link) else "slowmo")
        if about_flags := _about_flags(link):
            return about_flags
        if isinstance(link, FloatingPointError):
            return _advised(str(link))
        if isinstance(link, (MemoryError, RuntimeError, OSError)) and _short_of_memory(link):
            return MEMORY.format(_about_memory(link))
        if lost := meetings.lost_process(link):
            return lost
    # A bare Exception is how fairseq itself tells users of a mistake.
    told = (str(link) for link in chain if isinstance(link, OSError) or type(link) is Exception)
    return next(told, None)


def _about_flags(error: BaseException) -> str | None:
    """Return a sentence about an error of fairseq, omegaconf or a generator that concerns flags; else None."""
    if isinstance(error, omegaconf.errors.InterpolationKeyError) and COMPONENTS_KEY.search(str(error)):
        return f"{first_line(error)}: --task, --criterion and --arch must go together, as {DOCUMENTS} or {SIGNALS} do"
    if isinstance(error, CONFIGURATION):
        return f"configuration key {error.full_key}: {first_line(error)}"
    if about_hydra := _about_hydra(error):
        return about_hydra
    if isinstance(error, ValueError) and "size of optimizer's group" in str(error):
        return OTHER_WEIGHTS
    if isinstance(error, AssertionError) and "min_len cannot be larger than max_len" in str(error):
        return "--min-len is more than --max-len-a times a source sentence's length plus --max-len-b: change one"
    if isinstance(error, AssertionError) and "Must specify batch size" in str(error):
        return "no batch size: give --batch-size or --max-tokens (hydra: dataset.batch_size or dataset.max_tokens)"
    return None


def _about_hydra(error: BaseException) -> str | None:
    """Return the sentence for a mistake in hydra's command line or in YAML that hydra reads; else None."""
    if isinstance(error, hydra.errors.OverrideParseException):
        return (
            f"hydra cannot read {error.override}: write \"KEY='VALUE'\", both quotes included, and no backslash at the "
            "value's end"
        )
    if isinstance(error, hydra.errors.CompactHydraException) and not isinstance(error.__cause__, CONFIGURATION):
        return " ".join(line.strip() for line in str(error).splitlines())
    if isinstance(error, yaml.YAMLError):
        return f"no YAML: {' '.join(line.strip() for line in str(error).splitlines())}"
    if isinstance(error, ValueError) and "--multirun, --cfg, --info" in str(error):
        return str(error)
    return None


def _short_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def _about_memory(error: BaseException) -> str:
    """Return the part of an error that tells how much memory was asked for, without the place in the code."""
    found = re.search(
        r"(you tried to allocate \d+ bytes|[Tt]ried to allocate [\d.]+ \w+|Unable to allocate .*)", str(error)
    )
    return found[1] if found else first_line(error)


def _advised(message: str) -> str:
    """Return a message. fairseq's message of gradients that are not finite is replaced by advice."""
    return DIVERGED if message == "gradients are Nan/Inf" else message
