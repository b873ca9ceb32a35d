"""A user's mistake ends fairseq's commands with one sentence in place of a stack trace.

So do flags of a configuration that are unknown or do not go together, and training that has diverged.
"""

import os
import re
import sys
import types

import hydra.errors
import omegaconf

from fairseq_rkm.errors import RKMError, first_line
from fairseq_rkm.fairseq_patches import interruptions, processes
from fairseq_rkm.fairseq_patches.commands import in_fairseq_command
from fairseq_rkm.fairseq_patches.registry import setting

DOCUMENTS = "--task sentence_prediction --criterion sentence_prediction --arch rkm_classifier"
"""What classifies documents: each of the three reads flags of the others."""

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

NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Cannot allocate memory|MemoryError|killed by signal: Killed"
)
"""What errors of PyTorch, Python and the operating system say when memory is short."""


@setting(
    "sys.excepthook",
    why="a user's mistake ends fairseq's commands in a stack trace, and hydra prints errors itself",
    until="fairseq prints its users' mistakes in a sentence",
)
def sentences_for_mistakes() -> None:
    """Print errors by :func:`print_error`, in fairseq's commands only; hydra is told to leave errors alone."""
    if in_fairseq_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = print_error
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")


def print_error(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """``sys.excepthook``: one sentence for a user's mistake, the stack trace for anything else."""
    if interruptions.received:
        # It was told already, and what fails while the process ends is no news.
        raise SystemExit(128 + interruptions.received[0])
    sentence = sentence_of(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"fairseq-rkm: error: {sentence}", file=sys.stderr)


def sentence_of(error: BaseException | None) -> str | None:
    """The message of the user's mistake behind an error: fairseq wraps some, and so do its worker processes."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, RKMError):
            return str(link)
        if about_flags := _about_flags(link):
            return about_flags
        if isinstance(link, FloatingPointError):
            return _advised(str(link))
        in_worker = re.search(rf"({RKMError.__module__}.{RKMError.__name__}|FloatingPointError): (.*)", str(link))
        if in_worker:
            return _advised(in_worker[2])
        if isinstance(link, (MemoryError, RuntimeError, OSError)) and _short_of_memory(link):
            return MEMORY.format(_about_memory(link))
        if lost := processes.lost_process(link):
            return lost
    # A bare Exception is how fairseq itself tells users of a mistake.
    told = (str(link) for link in chain if isinstance(link, OSError) or type(link) is Exception)
    return next(told, None)


def _about_flags(error: BaseException) -> str | None:
    """What is wrong with the flags, if an error of hydra's, omegaconf's or a generator's is about them."""
    if isinstance(error, omegaconf.errors.InterpolationKeyError):
        return f"{first_line(error)}: --task, --criterion and --arch must go together, as {DOCUMENTS} do"
    if isinstance(error, (omegaconf.errors.ValidationError, omegaconf.errors.ConfigKeyError)):
        return f"configuration key {error.full_key}: {first_line(error)}"
    if isinstance(error, hydra.errors.OverrideParseException):
        return f"a value that hydra cannot read, for its quotes or a backslash at its end: {first_line(error)}"
    if isinstance(error, AssertionError) and "min_len cannot be larger than max_len" in str(error):
        return "--min-len is more than --max-len-a times a source sentence's length plus --max-len-b: change one"
    return None


def _short_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def _about_memory(error: BaseException) -> str:
    """What an error says of the memory that there was not, without where it was raised."""
    found = re.search(
        r"(you tried to allocate \d+ bytes|[Tt]ried to allocate [\d.]+ \w+|Unable to allocate .*)", str(error)
    )
    return found[1] if found else first_line(error)


def _advised(message: str) -> str:
    """A message, or in place of fairseq's of gradients that are not finite what to do about them."""
    return DIVERGED if message == "gradients are Nan/Inf" else message
