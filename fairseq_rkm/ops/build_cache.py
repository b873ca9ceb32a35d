"""What is compiled at run time, kept in the user's cache."""

import atexit
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def built(name: str, inputs: Iterable[str], build: Callable[[Path], object]) -> Path:
    """The file that ``build`` writes, from the cache if it was built from the same inputs before.

    Args:
        name: the file's, to which a digest of the inputs is added.
        inputs: all that the result depends on.
        build: writes the file at the path that it is given; what it raises is passed on.
    """
    path = Path(name)
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    target = _folder() / f"{path.stem}-{digest}{path.suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder) / target.name
            build(part)
            part.replace(target)  # at once, whoever else builds the same
    return target


def _folder() -> Path:
    """The user's cache; where it cannot be written, a folder that goes with this process."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fairseq_rkm"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the second where a user has no home
        return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="fairseq_rkm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
