"""Errors that stand for a user's mistake."""


class RKMError(ValueError):
    """A flag, a shape, a file or a value that cannot be used. The message names the fault, its place and a remedy.

    fairseq's commands print only the message, without a stack trace (see ``fairseq_patches/error_messages.py``).
    """


class FairseqMissingError(RKMError, ModuleNotFoundError):
    """fairseq is needed and not installed. The message names the extra that installs it."""

    def __init__(self) -> None:
        super().__init__(
            "this needs fairseq, which is not installed: pip install 'fairseq-rkm[fairseq]' (docs/installation.md says "
            "what building it needs). RKM itself, from fairseq_rkm import RKM, works without"
        )


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the error's type if it has no message.

    >>> first_line(ValueError("wrong\ndetails")), first_line(KeyError())
    ('wrong', 'KeyError')
    """
    return next(iter(str(error).splitlines()), type(error).__name__)
