"""Unpack archives of models, each into a folder of its own."""

import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fairseq_rkm.errors import RKMError

MOST_BYTES = 64 << 30
"""The most bytes that an archive may unpack to."""

ARCHIVE_EXPANSION = 100
"""How many times its own size an archive may unpack to."""

MOST_FILES = 10_000


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a tar archive (compressed or not) or a zip archive, unless it was unpacked before.

    Args:
        archive: the archive's file, left as it is.
        folder: the parent of the new folder. The new folder's name is made of the archive's name and checksum.

    Returns:
        The archive's only folder if all its files are in one, else the new folder.

    Raises:
        RKMError: the file is damaged or not an archive; or it has links, devices, names that lead outside, or too many
            files or bytes.
    """
    target = folder / f"{archive.name.split('.')[0] or 'model'}-{_digest(archive)}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".unpacking-"))
        try:
            _unpack(archive, partial)
            _put(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _put(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _unpack(archive: Path, target: Path) -> None:
    left = min(MOST_BYTES, ARCHIVE_EXPANSION * archive.stat().st_size + (1 << 20))
    try:
        for number, (name, content) in enumerate(_members(archive)):
            if number >= MOST_FILES:
                raise RKMError(f"refused {archive}: it has more than {MOST_FILES} files")
            left -= _copy(content, _place(archive, name, target), left, archive)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError) as error:
        raise RKMError(f"cannot unpack {archive}: it is damaged or no archive ({error})") from error
    if not any(target.iterdir()):
        raise RKMError(f"cannot unpack {archive}: it holds no files")


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and contents of an archive's regular files."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as content:
                        yield entry.filename, content
        return
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isdir():
                continue
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                raise RKMError(f"refused {path}: {member.name} is neither a file nor a folder")
            yield member.name, file


def _place(archive: Path, name: str, target: Path) -> Path:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or not parts or any(part == ".." or "\\" in part or ":" in part for part in parts):
        raise RKMError(f"refused {archive}: its file {name!r} would lie outside its folder")
    return target.joinpath(*parts)


def _copy(content: IO[bytes], place: Path, most: int, archive: Path) -> int:
    place.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        while block := content.read(1 << 20):
            written += len(block)
            if written > most:
                raise RKMError(f"refused {archive}: it unpacks to more than {ARCHIVE_EXPANSION} times its size")
            file.write(block)
    return written
