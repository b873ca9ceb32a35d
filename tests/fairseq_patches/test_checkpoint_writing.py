import errno
import fcntl
import os
import subprocess
import sys

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from hypothesis import given, settings
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.fairseq_patches import checkpoint_writing

fairseq_rkm.register()
STATE = {"model": torch.arange(3000.0)}


class Stopping:
    """A file that takes no more than some bytes, and then raises an error."""

    def __init__(self, file, room: int, error: BaseException):
        self.file, self.room, self.error = file, room, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)


def stopped(room: int, error: BaseException):
    """torch.save that writes into such a file."""
    save = torch.save
    return lambda state, file: save(state, Stopping(file, room, error))


@settings(deadline=None, max_examples=40)
@given(room=st.integers(0, 12_000), full=st.booleans(), copied=st.booleans())
def test_wherever_writing_stops_the_earlier_file_is_whole(tmp_path_factory, room, full, copied):
    folder = tmp_path_factory.mktemp("run")
    last, first = folder / "checkpoint_last.pt", folder / "checkpoint1.pt"
    torch.save({"old": 1}, last)
    torch.save(STATE, first)
    before = last.read_bytes()
    error = OSError(errno.ENOSPC, "No space left on device") if full else KeyboardInterrupt()
    with pytest.MonkeyPatch.context() as patched:
        copy = checkpoint_writing._copy_blocks
        patched.setattr(checkpoint_writing, "_copy_blocks", lambda old, new: copy(old, Stopping(new, room, error)))
        patched.setattr(checkpoint_writing, "FICLONE", 0)
        patched.setattr(torch, "save", stopped(room, error))
        write = PathManager.copy if copied else checkpoint_utils.torch_persistent_save
        with pytest.raises(RKMError if full else KeyboardInterrupt) as raised:
            write(str(first) if copied else STATE, str(last))
    assert last.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {last.name, first.name}
    if full:
        assert f"cannot write {last}: No space left on device" in str(raised.value)


def test_a_copy_is_a_file_of_its_own(tmp_path):
    """Damage to one name, as by a user's `cp` over it, leaves the others whole: no hard links."""
    first, last = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save(STATE, str(first))
    assert PathManager.copy(str(first), str(last), overwrite=True)
    assert first.read_bytes() == last.read_bytes()
    with open(last, "r+b") as file:
        file.truncate(100)
    assert torch.equal(torch.load(first, weights_only=True)["model"], STATE["model"])


def test_an_error_that_passes_is_tried_again_into_a_new_file(tmp_path, monkeypatch):
    tries, save = [], torch.save
    monkeypatch.setattr(checkpoint_writing.time, "sleep", lambda _: None)

    def unsteady(state, file):
        tries.append(file.tell())
        save(state, Stopping(file, 5000 if len(tries) < 3 else 10**6, OSError(errno.ESTALE, "Stale file handle")))

    monkeypatch.setattr(torch, "save", unsteady)
    checkpoint_utils.torch_persistent_save(STATE, str(tmp_path / "checkpoint1.pt"))
    assert tries == [0, 0, 0]
    assert torch.equal(torch.load(tmp_path / "checkpoint1.pt", weights_only=True)["model"], STATE["model"])


def test_an_error_of_the_program_is_no_error_of_the_folder(tmp_path):
    with pytest.raises((AttributeError, TypeError, RuntimeError), match=r"lambda|pickle"):
        checkpoint_utils.torch_persistent_save({"function": lambda: 0}, str(tmp_path / "checkpoint1.pt"))
    assert not list(tmp_path.iterdir())


def test_left_over_files_go_at_the_next_start_and_those_of_a_live_run_stay(tmp_path):
    killed, old = tmp_path / "checkpoint_last.pt.99.tmp", tmp_path / "checkpoint_best.pt.tmp"
    others = [tmp_path / name for name in ("checkpoint_last.pt", "notes.tmp", "checkpoint1.pt")]
    for path in (killed, old, *others):
        path.write_text("part")
    live = tmp_path / "checkpoint1.pt.7.tmp"
    code = f"import fcntl; f = open({str(live)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    assert set(tmp_path.iterdir()) == {live, *others}
    process.communicate("\n")
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    assert set(tmp_path.iterdir()) == set(others)


def test_what_is_being_written_is_locked(tmp_path):
    locked = []

    def look(file):
        with open(file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}", "rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)

    checkpoint_writing.write_beside(str(tmp_path / "checkpoint1.pt"), look)
    assert locked == [True]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RKMError, match=r"cannot be written to --save-dir .*file/run: Not a directory"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "file/run"))


def test_files_have_the_mode_that_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint_utils.torch_persistent_save(STATE, str(tmp_path / "checkpoint1.pt"))
    finally:
        os.umask(before)
    assert (tmp_path / "checkpoint1.pt").stat().st_mode & 0o777 == 0o640
