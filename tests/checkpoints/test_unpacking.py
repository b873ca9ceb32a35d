import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from fairseq import file_utils

import fairseq_rkm
from fairseq_rkm import RKMError
from fairseq_rkm.checkpoints.unpacking import unpack


def tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
            else:
                member.size = len(content)
            archive.addfile(member, None if isinstance(content, tuple) else io.BytesIO(content))
    return path


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w"])
def test_an_archive_is_unpacked_into_a_folder_of_its_own_and_kept(tmp_path, monkeypatch, mode):
    fairseq_rkm.register()
    monkeypatch.setattr(file_utils, "PYTORCH_FAIRSEQ_CACHE", tmp_path / "cache")
    archive = tar(tmp_path / "m.tar.gz", {"model/model.pt": b"weights", "model/dict.txt": b"a 1\n"}, mode)
    before = archive.read_bytes()
    for _ in range(2):
        folder = file_utils.load_archive_file(str(archive))
        assert Path(folder, "model.pt").read_bytes() == b"weights"
    assert archive.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "m.tar.gz"]


def test_files_without_a_folder_and_zip_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("model.pt", b"weights")
        archive.writestr("sub/dict.txt", b"a 1\n")
    folder = unpack(tmp_path / "m.zip", tmp_path / "cache")
    assert (folder / "model.pt").read_bytes() == b"weights"
    assert (folder / "sub" / "dict.txt").exists()


REFUSED = {
    "a name that leads up": ({"../evil": b"x"}, "outside its folder"),
    "a name that leads up further in": ({"a/../../evil": b"x"}, "outside its folder"),
    "an absolute name": ({"/evil": b"x"}, "outside its folder"),
    "a symbolic link": ({"a": (tarfile.SYMTYPE, "/etc"), "a/evil": b"x"}, "neither a file nor a folder"),
    "a hard link": ({"a": (tarfile.LNKTYPE, "/etc/passwd")}, "neither a file nor a folder"),
    "a device": ({"a": (tarfile.CHRTYPE, "")}, "neither a file nor a folder"),
    "a file that expands": ({"a": bytes(40 << 20)}, "unpacks to more than 100 times its size"),
    "a name twice": ({"a": b"x", "./a": b"y"}, "damaged or no archive"),
    "a folder under a file": ({"a": b"x", "a/b": b"y"}, "damaged or no archive"),
    "nothing": ({}, "holds no files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_left(tmp_path, case):
    members, message = REFUSED[case]
    archive = tar(tmp_path / "m.tar.gz", members)
    with pytest.raises(RKMError, match=message):
        unpack(archive, tmp_path / "cache")
    assert archive.exists()
    assert list((tmp_path / "cache").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "m.tar.gz"]


def test_no_archive(tmp_path):
    (tmp_path / "m.tar.gz").write_bytes(b"nothing of the kind")
    with pytest.raises(RKMError, match="damaged or no archive"):
        unpack(tmp_path / "m.tar.gz", tmp_path / "cache")
