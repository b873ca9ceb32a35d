import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairseq_rkm.ops import build_cache, nvrtc

BUILD = """
from pathlib import Path
from fairseq_rkm.ops.build_cache import built
path = built("a.txt", ["x"], lambda path: path.write_text("built"))
print(path, path.read_text())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    return tmp_path / "new" / "fairseq_rkm"


def test_what_was_built_from_the_same_inputs_is_not_built_again(cache):
    calls = []

    def build(path: Path) -> None:
        calls.append(path)
        path.write_text(f"result {len(calls)}")

    first = build_cache.built("a.txt", ["x", "y"], build)
    assert first.parent == cache
    assert build_cache.built("a.txt", ["x", "y"], build) == first
    assert first.read_text() == "result 1"
    others = [build_cache.built(name, inputs, build) for name, inputs in (("a.txt", ["x\ny"]), ("b.txt", ["x", "y"]))]
    assert len({first, *others}) == 3
    assert len(calls) == 3
    assert sorted(cache.iterdir()) == sorted({first, *others}), "nothing else is left"


def test_what_fails_leaves_nothing(cache):
    def build(path: Path) -> None:
        path.write_text("half")
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        build_cache.built("a.txt", ["x"], build)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_replaced_while_the_process_lives(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=True)
    path, content = done.stdout.split()
    assert content == "built"
    assert Path(path).is_relative_to(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_user_without_a_home_has_a_cache_while_the_process_lives(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert build_cache.built("a.txt", ["x"], lambda path: path.write_text("built")).read_text() == "built"


class Compiler:
    """NVRTC's functions; the machine code is the options and the text."""

    def __init__(self):
        self.compiled = 0

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = 13, 0

    def nvrtcCreateProgram(self, _program, text, *_rest):
        self.image = text

    def nvrtcCompileProgram(self, _program, count, options):
        self.compiled += 1
        self.image = b" ".join([*options[:count], self.image])
        return b"error" in self.image

    def nvrtcGetCUBINSize(self, _program, size):
        size._obj.value = len(self.image)

    def nvrtcGetCUBIN(self, _program, room):
        ctypes.memmove(room, self.image, len(self.image))

    nvrtcGetProgramLogSize, nvrtcGetProgramLog = nvrtcGetCUBINSize, nvrtcGetCUBIN

    def nvrtcDestroyProgram(self, _program):
        pass


def test_kernels_are_compiled_once_for_all_processes(cache, tmp_path, monkeypatch):
    compiler, source = Compiler(), tmp_path / "kernel.cu"
    monkeypatch.setattr(nvrtc, "_compiler", lambda: compiler)
    source.write_text("a kernel")

    def compile_anew(macros, capability=(9, 0)):
        return nvrtc.compile_image.__wrapped__(source, macros, capability)

    image = compile_anew((("N", 1),))
    assert image == b"-arch=sm_90 -std=c++17 -default-device -DN=1 a kernel"
    assert compile_anew((("N", 1),)) == image
    assert compiler.compiled == 1
    assert compile_anew((("N", 2),)) != image
    assert compile_anew((("N", 1),), (8, 0)) != image
    source.write_text("another kernel")
    assert compile_anew((("N", 1),)) != image
    assert compiler.compiled == 4
    assert len(list(cache.glob("kernel-*.cubin"))) == 4
    source.write_text("an error")
    with pytest.raises(RuntimeError, match=r"kernel.cu does not compile with .*-DN=1"):
        compile_anew((("N", 1),))
    assert len(list(cache.iterdir())) == 4
