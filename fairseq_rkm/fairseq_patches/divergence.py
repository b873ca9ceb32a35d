"""Training that diverges ends with advice, and not with a dump of all gradients."""

from typing import Any

from fairseq.nan_detector import NanDetector

from fairseq_rkm.fairseq_patches.registry import patch


@patch(
    NanDetector,
    "__exit__",
    why="fairseq prints the norms of all weights and every gradient that is not finite, which buries the sentence",
    until="fairseq says what to do about gradients that are not finite",
)
def close_alone(_exit: Any) -> Any:
    """Make ``NanDetector.__exit__`` remove its hooks and print nothing."""

    def exit_quietly(detector: NanDetector, *_error: Any) -> None:
        detector.close()

    return exit_quietly


@patch(
    NanDetector,
    "_apply",
    why="fairseq warns of modules that hand on what is not finite, and advises nothing: it buries the sentence",
    until="fairseq says what to do about gradients that are not finite",
)
def look_away(_apply: Any) -> Any:
    """Make ``NanDetector._apply`` print nothing."""

    def pass_by(_detector: NanDetector, *_seen: Any, **_how: Any) -> None:
        """Ignore a module: in a diverged run every module hands on values that are not finite."""

    return pass_by
