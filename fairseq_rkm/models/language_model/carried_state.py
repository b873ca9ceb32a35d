"""State carried from one segment of a stream to the next (truncated backpropagation through time)."""

from typing import Generic, TypeVar

from fairseq_rkm.errors import RKMError

State = TypeVar("State")


class CarriedState(Generic[State]):
    """The state after segment k - 1, for segment k.

    The segment's number is its key. Segment 0 starts afresh at any time. A segment run twice, after an overflow in
    mixed precision or a lack of memory, starts twice from the same state.
    """

    def __init__(self) -> None:
        self.segment = -1
        self.entered: State | None = None
        self.left: State | None = None

    def before(self, segment: int) -> State | None:
        """The state to start a segment from; None for zeros.

        Raises:
            RKMError: the segment neither starts a stream nor follows or repeats the last one.
        """
        if segment == 0:
            return None
        if segment == self.segment:
            return self.entered
        if segment == self.segment + 1:
            return self.left
        raise RKMError(
            f"segment {segment} of the stream came after segment {self.segment}: a stream's segments must be run in "
            "order, from its first or from where a checkpoint of this task left it"
        )

    def after(self, segment: int, entered: State | None, left: State) -> None:
        """Record the states before and after a segment, both cut from the graph."""
        self.segment, self.entered, self.left = segment, entered, left

    def restore(self, segment: int, left: State) -> None:
        """Go on as if ``segment`` had just ended in the state ``left``."""
        self.after(segment, None, left)
