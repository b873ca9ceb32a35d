"""The one error that stands for a user's mistake."""


class RKMError(ValueError):
    """A flag, a shape, a file or a value that cannot be used: the message says what, where, and what to do.

    On fairseq's command line only the message is printed, without a stack trace
    (see ``fairseq_patches/error_messages.py``).
    """


class FairseqMissingError(RKMError, ModuleNotFoundError):
    """What was asked for needs fairseq, which is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "this needs fairseq, which is not installed: pip install 'fairseq-rkm[fairseq]' (docs/installation.md says "
            "what building it needs). RKM itself, from fairseq_rkm import RKM, works without"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or for want of one its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)
