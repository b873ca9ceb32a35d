import ctypes
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fairseq_rkm
from fairseq_rkm.ops.backends.native import native
from fairseq_rkm.ops.compilation import build_cache, nvrtc

CONTENT = bytes(range(256)) * 16
COMPILE = (
    "from fairseq_rkm.ops import CELLS; from fairseq_rkm.ops.backends.native.native import library; "
    "library(CELLS['lstm']); print('compiled')"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; what goes with this process stands beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build_cache._private_folder.cache_clear()
    build_cache._say.cache_clear()
    yield tmp_path / "new" / "fairseq_rkm"
    build_cache._private_folder.cache_clear()


def write(path: Path) -> None:
    path.write_bytes(CONTENT)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )


def test_what_was_built_from_the_same_inputs_is_not_built_again(cache):
    calls = []

    def build(path: Path) -> None:
        calls.append(path)
        path.write_text(f"result {len(calls)}")

    first = build_cache.built("a.txt", ["x", "y"], build)
    assert first.path.parent == cache
    assert build_cache.built("a.txt", ["x", "y"], build) == first
    assert first.content == first.path.read_bytes() == b"result 1"
    others = [build_cache.built(name, inputs, build) for name, inputs in (("a.txt", ["x\ny"]), ("b.txt", ["x", "y"]))]
    paths = {result.path for result in (first, *others)}
    assert len(paths) == len(calls) == 3
    assert set(cache.iterdir()) == paths, "nothing else is left"


def test_what_fails_leaves_nothing(cache):
    def build(path: Path) -> None:
        path.write_text("half")
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        build_cache.built("a.txt", ["x"], build)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_what_is_kept_is_the_user_s_alone_whatever_the_umask(cache, mask):
    before = os.umask(mask)
    try:
        path = build_cache.built("a.txt", ["x"], write).path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (cache, cache.parent)] == [0o700, 0o700]
    assert build_cache.built("a.txt", ["x"], None).path == path, "it is taken, not built"


@st.composite
def damages(draw):
    """What may have become of CONTENT."""
    position = draw(st.integers(0, len(CONTENT) - 1))
    kind = draw(st.sampled_from(["cut", "flipped", "longer", "zeros"]))
    if kind == "cut":
        return CONTENT[:position]
    if kind == "longer":
        return CONTENT + draw(st.binary(min_size=1, max_size=9))
    if kind == "zeros":
        return CONTENT[:position] + b"\1" * (len(CONTENT) - position)
    return CONTENT[:position] + bytes([CONTENT[position] ^ draw(st.integers(1, 255))]) + CONTENT[position + 1 :]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(damages())
def test_a_damaged_file_is_built_anew(cache, damage):
    path = build_cache.built("a.txt", ["x"], write).path
    path.write_bytes(damage)
    anew = build_cache.built("a.txt", ["x"], write)
    assert anew == (path, CONTENT)
    assert path.read_bytes() == CONTENT


def test_a_library_cut_in_half_is_compiled_anew(cache):
    python(COMPILE)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert python(COMPILE).stdout == "compiled\n"
    (anew,) = cache.iterdir()
    assert anew.stat().st_size > len(whole) // 2


def _open_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def _open_folder_to_its_group(path: Path) -> None:
    path.parent.chmod(0o770)


def _open_folder_above(path: Path) -> None:
    path.parents[1].chmod(0o777)


def _open_link(path: Path) -> None:
    """The cache is a link to a folder that stands in one where others may write."""
    hall = path.parents[2] / "hall"
    hall.mkdir()
    path.parent.rename(hall / "cache")
    path.parent.symlink_to(hall / "cache")
    hall.chmod(0o777)


@pytest.mark.parametrize("expose", [_open_folder, _open_folder_to_its_group, _open_folder_above, _open_link])
def test_where_others_may_write_nothing_is_loaded_from(cache, caplog, tmp_path, expose):
    path = build_cache.built("a.txt", ["x"], write).path
    expose(path)
    for _ in range(2):
        own = build_cache.built("a.txt", ["x"], write)
        assert own.content == CONTENT
        assert own.path.parent.parent == tmp_path
        assert own.path.parent.name.startswith("fairseq_rkm-")
        assert stat.S_IMODE(own.path.parent.stat().st_mode) == 0o700
    assert caplog.text.count("others may write in") == 1


def _give_to_others(path: Path) -> None:
    path.chmod(0o666)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [_give_to_others, _link, _pipe])
def test_a_file_that_may_be_another_s_is_built_anew(cache, change):
    path = build_cache.built("a.txt", ["x"], write).path
    change(path)
    built = []
    anew = build_cache.built("a.txt", ["x"], lambda part: built.append(write(part)))
    assert built == [None]
    assert anew == (path, CONTENT)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600


def test_a_cache_of_another_user_s_is_not_loaded_from(cache, caplog, monkeypatch):
    path = build_cache.built("a.txt", ["x"], write).path
    monkeypatch.setattr(build_cache, "_weakness_on_the_way", lambda _path: None)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert build_cache.built("a.txt", ["x"], write).path.parent != cache
    assert "is another user's" in caplog.text


def test_without_any_place_of_the_user_s_own_it_is_refused(cache, tmp_path):
    cache.mkdir(parents=True)
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match=r"no place for compiled code: others may write in .*TMPDIR"):
        build_cache.built("a.txt", ["x"], write)


def test_a_cache_that_cannot_be_written_is_replaced_while_the_process_lives(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code = """
from fairseq_rkm.ops.compilation.build_cache import built
for _ in range(2):
    print(*built("a.txt", ["x"], lambda path: path.write_text("built")))
"""
    done = python(code, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    path, content = done.stdout.splitlines()[1].split()
    assert content == "b'built'"
    assert Path(path).is_relative_to(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert done.stderr.count("compiled code is not kept") == 1


def test_a_user_without_a_home_has_a_cache_while_the_process_lives(cache, monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    assert build_cache.built("a.txt", ["x"], write).content == CONTENT


def _build_slowly(path: Path) -> None:
    time.sleep(0.2)
    write(path)


def _build_in_process(queue) -> None:
    queue.put(build_cache.built("a.txt", ["x"], _build_slowly))


def test_processes_that_build_the_same_at_once_get_the_same(cache):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_build_in_process, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [queue.get() for _ in processes]
    assert {content for _, content in results} == {CONTENT}
    assert {path for path, _ in results} == set(cache.iterdir())


@pytest.mark.parametrize("kept", [True, False])
def test_a_compilation_that_was_killed_leaves_nothing(cache, tmp_path, kept):
    compiler, started = tmp_path / "compiler", tmp_path / "started"
    compiler.write_text(f'#!/bin/sh\necho half > "$TMPDIR/cc1.s"\necho > {started}\nexec sleep 60\n')
    compiler.chmod(0o700)
    cache.mkdir(parents=True, mode=0o700)
    place = cache if kept else tmp_path
    if not kept:
        cache.chmod(0o777)
    environment = {**os.environ, "CC": str(compiler), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(place.rglob("cc1.s")), "there was something to leave"
    left = next(place.rglob("cc1.s"))
    path = build_cache.built("a.txt", ["x"], write).path
    assert not left.exists()
    assert not list(place.rglob("building-*"))
    assert set(path.parent.iterdir()) == {path}


def test_what_another_process_is_building_is_left_to_it(cache):
    def build(path: Path) -> None:
        build_cache.built("b.txt", ["x"], write)
        write(path)

    assert build_cache.built("a.txt", ["x"], build).content == CONTENT


def test_an_lstm_falls_back_as_all_cells_do(cache, caplog, monkeypatch):
    """Its code may be what cannot be compiled where that of another cell lies in the cache."""
    from fairseq_rkm.ops import CELLS

    monkeypatch.setenv("CC", "/bin/false")
    monkeypatch.setattr(native, "library", native.library.__wrapped__)
    for function in (native._missing, native._say):
        function.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert all("/bin/false cannot compile" in native._missing(CELLS[name]) for name in ("lstm", "rkm_lstm"))
    finally:
        for function in (native._missing, native._say):
            function.cache_clear()
    assert caplog.text.count("run in plain PyTorch") == 1


def test_kernels_for_gpus_are_compiled_where_nothing_can_be_kept(tmp_path, monkeypatch):
    def refuse(*_arguments: object) -> None:
        raise OSError("there is no place for compiled code")

    (tmp_path / "kernel.cu").write_text("a kernel")
    monkeypatch.setattr(nvrtc, "_compiler", Compiler)
    monkeypatch.setattr(nvrtc, "built", refuse)
    assert nvrtc.compile_image.__wrapped__(tmp_path / "kernel.cu", (), (9, 0)).endswith(b"a kernel")


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


def test_the_compiler_gets_kernels_with_their_header_in_place(monkeypatch):
    monkeypatch.setattr(nvrtc, "_compiler", Compiler)

    def refuse(*_arguments: object) -> None:
        raise OSError("there is no place for compiled code")

    monkeypatch.setattr(nvrtc, "built", refuse)
    sources = list(Path(fairseq_rkm.__file__).parent.rglob("*.cu"))
    images = {source.stem: nvrtc.compile_image.__wrapped__(source, (), (9, 0)) for source in sources}
    assert len(images) >= 5
    assert not any(b"#include" in image for image in images.values())
    with_numbers = {name for name, image in images.items() if b"float widen(Stored x)" in image}
    assert with_numbers == {"persistent", "blockwise", "few_steps"}
    assert all(image.count(b"typedef u16 Stored;") == 1 for name, image in images.items() if name in with_numbers)
