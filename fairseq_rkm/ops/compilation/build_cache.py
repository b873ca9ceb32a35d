"""What is compiled at run time, kept in the user's cache.

What lies there is loaded into the process, so others must not be able to put it there: the folder, and all folders and
links on the way to it, have to be the user's or root's, and others may not write there. Where they may, or where there
is no folder to write, this process compiles for itself, into a folder that goes with it. A file's name holds a checksum
of its content: a damaged file is built anew.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import util
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

BUILDING = "building-"
"""What the names of folders begin with in which something is being built."""

PRIVATE = "fairseq_rkm-"
"""What the names of folders begin with that go with a process."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Built(NamedTuple):
    """A file and its content, which has been checked.

    Attributes:
        path: where it is; nobody but the user (and root) can change it.
        content: all of it.
    """

    path: Path
    content: bytes


def built(name: str, inputs: Iterable[str], build: Callable[[Path], object]) -> Built:
    """The file that ``build`` writes, from the cache if it was built from the same inputs before.

    Args:
        name: the file's, to which digests of the inputs and of the content are added.
        inputs: all that the result depends on.
        build: writes the file at the path that it is given, and may leave other files beside it, which are removed.

    Raises:
        OSError: there is no place that only the user can write, or it is full. What ``build`` raises is passed on.
    """
    if os.name != "posix":
        raise OSError("compiled code is kept on POSIX systems only")
    path, digest = Path(name), hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    folder, stem = _folder(), f"{path.stem}-{digest}"
    found = _find(folder, stem, path.suffix)
    if found is not None:
        return found
    _sweep(folder, BUILDING)
    with _folder_while_alive(folder, BUILDING) as place:
        part = place / name
        build(part)
        part.chmod(0o600)
        content = part.read_bytes()
        target = folder / f"{stem}-{_checksum(content)}{path.suffix}"
        part.replace(target)  # at once, whoever else builds the same
    return Built(target, content)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _find(folder: Path, stem: str, suffix: str) -> Built | None:
    """A whole file of the user's in the folder; damaged ones are removed."""
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        content = _read(path)
        if content is not None and path.name == f"{stem}-{_checksum(content)}{suffix}":
            return Built(path, content)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _read(path: Path) -> bytes | None:
    """A file's content; None if it is no file of the user's that only they can write."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # neither a link nor a pipe is waited for
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            mine = status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE
            return file.read() if mine and stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None


def _folder() -> Path:
    """The user's cache; where it cannot be used, a folder that goes with this process."""
    try:
        folder = _cache()
        _make(folder)
        problem = weakness(folder)
        if problem is None:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError) as error:  # the second where a user has no home
        problem = f"there is no cache to write ({error})"
    _say(problem)
    return _private_folder(os.getpid())


def _cache() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "fairseq_rkm"


def _make(folder: Path) -> None:
    """The folder and those above it that are missing, for the user alone whatever the umask."""
    for missing in (*reversed(folder.parents), folder):
        if not missing.is_dir():
            with contextlib.suppress(FileExistsError):  # made by another process meanwhile, or no folder: seen later
                missing.mkdir(0o700)
                missing.chmod(0o700)


@functools.cache
def _say(problem: str) -> None:
    logger.warning(
        "compiled code is not kept: %s. This process compiles it for itself; to keep it, set XDG_CACHE_HOME to a "
        "folder of yours that nobody else can write",
        problem,
    )


def weakness(folder: Path) -> str | None:
    """How somebody else could put a file into a folder, or another folder in its place; None if nobody can.

    Raises:
        OSError: there is no such folder.
    """
    status = folder.stat()
    if status.st_uid != os.getuid():
        return f"{folder} is another user's"
    if status.st_mode & _OTHERS_WRITE:
        return f"others may write in {folder} (chmod 700 it)"
    return _weakness_on_the_way(folder.absolute())


def _weakness_on_the_way(path: Path) -> str | None:
    for part in (*reversed(path.parents), path):
        part.stat()  # links that go round in a circle end here
        status = part.lstat()
        if status.st_uid not in (os.getuid(), 0):
            return f"{part} is another user's"
        if stat.S_ISLNK(status.st_mode):
            problem = _weakness_on_the_way(part.parent / part.readlink())
            if problem is not None:
                return problem
        elif _others_replace_entries(status):
            return f"others may write in {part}"
    return None


def _others_replace_entries(status: os.stat_result) -> bool:
    """Whether others may rename what is in a folder; in one like /tmp (sticky) they cannot."""
    if status.st_mode & stat.S_ISVTX:
        return False
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _is_own_group(group_id: int) -> bool:
    """Whether a group is the one that some systems make for each user, who is alone in it."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and not set(group.gr_mem) - {user.pw_name}


@functools.cache
def _private_folder(_process: int) -> Path:
    """A folder that goes with the process.

    Raises:
        OSError: others could put another in its place.
    """
    parent = Path(tempfile.gettempdir())
    problem = _weakness_on_the_way(parent.absolute())
    if problem is not None:
        raise OSError(f"there is no place for compiled code: {problem}; set TMPDIR to a folder of yours")
    _sweep(parent, PRIVATE)
    keep = contextlib.ExitStack()
    folder = keep.enter_context(_folder_while_alive(parent, PRIVATE))
    util.Finalize(None, keep.close, exitpriority=0)  # unlike atexit's, in processes of multiprocessing as well
    return folder


@contextlib.contextmanager
def _folder_while_alive(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder, removed in the end, by :func:`_sweep` of another process if this one is killed."""
    folder, lock = _new_locked_folder(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and a lock on it that ends with the process."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        folder.chmod(0o700)
        # Another process may have swept it away before it was locked.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            _lock(lock, wait=True)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders that killed processes of the user's have left."""
    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if _lock(lock, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(handle: int, wait: bool) -> bool:
    """Whether a folder could be locked; some network file systems lock none, so that nothing is swept there."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
