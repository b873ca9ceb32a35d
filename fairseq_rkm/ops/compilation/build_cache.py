"""The user's cache of files compiled at run time.

Its files are loaded into the process: nobody else may put any there. The folder, and all folders and links on the way
to it, must belong to the user or root, and be closed to others' writing. Where they are not, or where no folder can be
written, this process compiles for itself into a folder that ends with it. A file's name holds a checksum of its
content: a damaged file is built anew.
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
"""The beginning of the names of folders for building."""

PRIVATE = "fairseq_rkm-"
"""The beginning of the names of folders that are removed with a process."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Built(NamedTuple):
    """A file and its checked content.

    Attributes:
        path: the file's place; nobody but the user and root can change it.
        content: all of its bytes.
    """

    path: Path
    content: bytes


def built(name: str, inputs: Iterable[str], build: Callable[[Path], object]) -> Built:
    """The file that ``build`` writes; the cache's own, if it was built from the same inputs before.

    Args:
        name: the file's name; digests of the inputs and of the content are added.
        inputs: everything that the result depends on.
        build: writes the file at the given path. Other files that it leaves beside are removed.

    Raises:
        OSError: no place is writable by the user alone, or the place is full. Errors of ``build`` are passed on.
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
        part.replace(target)  # in one move, even if others build the same file
    return Built(target, content)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _find(folder: Path, stem: str, suffix: str) -> Built | None:
    """Find an undamaged file of the user's in the folder; damaged ones are removed."""
    for path in sorted(folder.glob(f"{stem}-*{suffix}")):
        content = _read(path)
        if content is not None and path.name == f"{stem}-{_checksum(content)}{suffix}":
            return Built(path, content)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _read(path: Path) -> bytes | None:
    """A file's content; None unless the file is the user's and nobody else can write it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # follow no link, wait for no pipe
        with open(handle, "rb") as file:
            status = os.fstat(handle)
            mine = status.st_uid == os.getuid() and not status.st_mode & _OTHERS_WRITE
            return file.read() if mine and stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None


def _folder() -> Path:
    """The user's cache; if it cannot be used, a folder that ends with this process."""
    try:
        folder = _cache()
        _make(folder)
        problem = weakness(folder)
        if problem is None:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        problem = f"there is no cache to write ({error})"
    _say(problem)
    return _private_folder(os.getpid())


def _cache() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "fairseq_rkm"


def _make(folder: Path) -> None:
    """Make the folder and its missing parents, for the user alone, whatever the umask."""
    for missing in (*reversed(folder.parents), folder):
        if not missing.is_dir():
            with contextlib.suppress(FileExistsError):  # another process made it, or it is no folder: checked later
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
    """The way for others to put a file into a folder, or a folder in its place; None if there is none.

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
        part.stat()  # raises for a circle of links
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
    """Whether others may rename a folder's entries; in a sticky one like /tmp they cannot."""
    if status.st_mode & stat.S_ISVTX:
        return False
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _is_own_group(group_id: int) -> bool:
    """Whether a group is the user's own: some systems make one for each user alone."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and not set(group.gr_mem) - {user.pw_name}


@functools.cache
def _private_folder(_process: int) -> Path:
    """A folder that ends with the process.

    Raises:
        OSError: others could put another folder in its place.
    """
    parent = Path(tempfile.gettempdir())
    problem = _weakness_on_the_way(parent.absolute())
    if problem is not None:
        raise OSError(f"there is no place for compiled code: {problem}; set TMPDIR to a folder of yours")
    _sweep(parent, PRIVATE)
    keep = contextlib.ExitStack()
    folder = keep.enter_context(_folder_while_alive(parent, PRIVATE))
    util.Finalize(None, keep.close, exitpriority=0)  # atexit does not run in processes of multiprocessing; this does
    return folder


@contextlib.contextmanager
def _folder_while_alive(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder, removed at the end; if this process is killed, :func:`_sweep` of another removes it."""
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
        # Another process may have swept the folder away before the lock.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            _lock(lock, wait=True)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the folders of the user's killed processes."""
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
    """Lock a folder, and say whether it worked; on network file systems without locks nothing is swept."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
