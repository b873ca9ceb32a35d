"""Training that diverges ends with what to do about it, and not with a dump of all gradients."""

import logging
from typing import Any

from fairseq.nan_detector import NanDetector

from fairseq_rkm.fairseq_patches.registry import patch

logger = logging.getLogger(__name__)


@patch(
    NanDetector,
    "__exit__",
    why="fairseq prints the norms of all weights and every gradient that is not finite, which buries the sentence",
    until="fairseq says what to do about gradients that are not finite",
)
def close_alone(_exit: Any) -> Any:
    """``NanDetector.__exit__`` that lets its hooks go and prints nothing."""

    def exit_quietly(detector: NanDetector, *_error: Any) -> None:
        detector.close()

    return exit_quietly


@patch(
    NanDetector,
    "_apply",
    why="fairseq warns of modules that hand on what is not finite, and advises nothing: it buries the sentence",
    until="fairseq says what to do about gradients that are not finite",
)
def look_quietly(_apply: Any) -> Any:
    """``NanDetector._apply`` that says which modules it found to whoever logs at DEBUG."""

    def look(detector: NanDetector, module: Any, _inp: Any, x: Any, backward: bool) -> None:
        values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
        for value in values:
            look(detector, module, _inp, value, backward)
        found = hasattr(x, "isfinite") and detector._detect(x, module.__module_name, backward)
        if found:
            logger.debug(found)

    return look
