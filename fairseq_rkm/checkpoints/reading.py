"""``torch.load`` for checkpoints that a stranger may have made."""

from pathlib import Path
from typing import Any

import torch

from fairseq_rkm.checkpoints import classes, contents, inspection
from fairseq_rkm.errors import RKMError, first_line


def load(file: Any, map_location: Any = "cpu", **_: Any) -> Any:
    """Read a checkpoint of fairseq's.

    Args:
        file: a path, or a file that has one.
        map_location: as in ``torch.load``.

    Raises:
        RKMError: a file that is damaged, is no checkpoint, or is refused; the message names it.
        OSError: no file there.
    """
    path = Path(file if isinstance(file, (str, Path)) else file.name)
    try:
        inspection.inspect(path)
        with torch.serialization.safe_globals(classes.allowed()):
            state = torch.load(path, map_location=map_location, weights_only=True)
        contents.check(state)
    except RKMError as error:
        raise RKMError(_explained(path, str(error))) from error
    except OSError:
        raise
    except Exception as error:
        raise RKMError(_explained(path, f"it is truncated or not a checkpoint ({first_line(error)})")) from error
    return state


def _explained(path: Path, reason: str) -> str:
    if reason.startswith("refused: "):
        return f"refused {path}: {reason.removeprefix('refused: ')}"
    return f"cannot read {path}: {reason}. Use an earlier one (checkpoint_best.pt, or a checkpoint of an earlier epoch)"
