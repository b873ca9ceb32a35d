"""``torch.load`` for checkpoints that a stranger may have made."""

from pathlib import Path
from typing import Any

import torch

from fairseq_rkm.checkpoints import classes, contents, inspection
from fairseq_rkm.errors import RKMError, first_line


def load(file: Any, map_location: Any = "cpu", **_: Any) -> Any:
    """Read a checkpoint of fairseq.

    >>> state = load("runs/lm/checkpoint_best.pt")
    >>> state["model"]["decoder.embed_tokens.weight"].shape
    torch.Size([10000, 400])

    Args:
        file: a path, or an open file that has a name.
        map_location: as in ``torch.load``.

    Returns:
        The checkpoint's dictionary: ``model`` holds the weights by name, ``cfg`` or ``args`` the flags.

    Raises:
        RKMError: the file is damaged, is not a checkpoint, or is refused; the message names it.
        OSError: there is no file.
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
