"""Checkpoints appear whole or not at all: each is written under another name, and renamed when it is complete."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_rkm.errors import RKMError
from fairseq_rkm.fairseq_patches.registry import patch

logger = logging.getLogger(__name__)

LEFT_OVER = re.compile(r"checkpoint.*\.pt(\.\d+)?\.tmp")
"""Names of unfinished files of a killed run: ours, and fairseq's own ``.pt.tmp``."""

PASSING = {errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.ESTALE}
"""Errors of a file system that is away for a moment, for example over a network. Writing is tried again after them."""

TRIES = 3

training_folders: list[str] = []
"""The folder of the run that this process trains. Empty if it trains none."""

FICLONE = 0x40049409
"""Number of the Linux ``ioctl`` that lets a copy share its source's blocks, where the file system can."""


@patch(
    checkpoint_utils,
    "torch_persistent_save",
    why="a failure to write is tried again into the same half-written file, and its stack trace is logged",
    until="fairseq writes a new file at each try, and says in a sentence why none was written",
)
def write_whole(_save: Any) -> Any:
    """Make ``torch_persistent_save`` write all of a file, or leave the old one as it was."""

    def torch_persistent_save(state: Any, filename: str, **_asynchronously: bool) -> None:
        write_beside(filename, lambda file: torch.save(state, file))

    return torch_persistent_save


@patch(
    checkpoint_utils,
    "save_checkpoint",
    why="with --write-checkpoints-asynchronously checkpoint_last.pt is not written, and no run resumes",
    until="fairseq writes all checkpoints asynchronously",
)
def write_all(save: Any) -> Any:
    """Make ``save_checkpoint`` write every file before training goes on."""

    def save_checkpoint(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        given, cfg.write_checkpoints_asynchronously = cfg.write_checkpoints_asynchronously, False
        try:
            return save(cfg, *args, **kwargs)
        finally:
            cfg.write_checkpoints_asynchronously = given

    return save_checkpoint


@patch(
    checkpoint_utils,
    "save_checkpoint",
    why="one process writes checkpoints, and what a task holds in the others is not in them",
    until="fairseq asks the tasks of all processes for their state before one writes it",
)
def gather_state(save: Any) -> Any:
    """Make ``save_checkpoint``, which all processes call, gather the task's state before one process writes."""

    def save_checkpoint(cfg: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        gather = getattr(trainer.task, "gather_checkpoint_state", None)
        if gather is not None and not cfg.no_save:
            gather()
        return save(cfg, trainer, *args, **kwargs)

    return save_checkpoint


@patch(
    PathManager,
    "copy",
    why="a run that is killed while fairseq copies checkpoint_last.pt leaves it truncated, and cannot resume",
    until="fairseq renames copies into their places",
)
def copy_whole(copy: Any) -> Any:
    """Make ``PathManager.copy`` rename a finished local copy into its place, one that shares blocks where possible."""

    def copied(source: str, target: str, overwrite: bool = False) -> Any:
        if PathManager.path_requires_pathmanager(source) or PathManager.path_requires_pathmanager(target):
            return copy(source, target, overwrite)
        with open(source, "rb") as given:
            write_beside(target, lambda file: _copy_blocks(given, file))
        return True

    return copied


def _copy_blocks(source: IO[bytes], target: Any) -> None:
    source.seek(0)
    try:
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
    except OSError:
        shutil.copyfileobj(source, target, 1 << 22)


def write_beside(path: str, write: Callable[[Any], Any]) -> None:
    """Write a file under another name in its folder, and rename it: the path holds the old or the new file, whole.

    Args:
        path: the file's path.
        write: writes all of the file into the file object that it is given. It is called again after an error that may
            pass, at most 3 times.

    Raises:
        RKMError: the folder is full or cannot be written to.
    """
    for left in reversed(range(TRIES)):
        try:
            with _beside(path) as file:
                write(file)
            return
        except (OSError, RuntimeError) as error:
            # torch's writer raises its own error after one of the file, or after an interruption.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):
                raise cause from None
            if not isinstance(cause, OSError):
                raise
            if not left or cause.errno not in PASSING:
                raise RKMError(
                    f"cannot write {path}: {cause.strerror or cause}. Nothing there was changed, and checkpoints "
                    "written before are whole: make room, or let the folder be written to, and start the same "
                    "command again"
                ) from error
        time.sleep(2.5)


@contextlib.contextmanager
def _beside(path: str) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the path's place if the block ends well, and is removed if it does not."""
    folder = os.path.dirname(os.path.abspath(path))
    temporary = f"{path}.{os.getpid()}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _hold(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hold(file: IO[bytes]) -> bool:
    """Lock a file until it is closed or its process ends. Return False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@patch(
    checkpoint_utils,
    "verify_checkpoint_directory",
    why="files that a killed run was writing stay for ever, and a folder that cannot be made ends in a stack trace",
    until="fairseq removes its temporary files, and says in a sentence what is wrong with the folder",
)
def clean_folder(verify: Any) -> Any:
    """Make ``verify_checkpoint_directory``, which training calls first, remove the unfinished files of killed runs."""

    def verify_checkpoint_directory(folder: str) -> None:
        try:
            verify(folder)
        except OSError as error:
            raise RKMError(
                f"checkpoints cannot be written to --save-dir {folder}: {error.strerror or error}. "
                "Name a folder that can be made and written to"
            ) from error
        training_folders[:] = [folder]
        remove_left_over(folder)

    return verify_checkpoint_directory


def remove_left_over(folder: str) -> None:
    """Remove the unfinished files of killed runs, and keep the files that a live run is writing."""
    for name in filter(LEFT_OVER.fullmatch, os.listdir(folder)):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if _hold(file):
                os.remove(path)
                logger.info(f"removed {path}, which a run that was killed had been writing")
