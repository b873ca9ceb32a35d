"""Which command compiles C, by a compiler that only writes down its arguments."""

import platform

import pytest

from fairseq_rkm.ops.compilation.c_compiler import compile_library


@pytest.mark.parametrize(("machine", "flag"), [("x86_64", "-march=native"), ("aarch64", "-mcpu=native")])
def test_code_is_for_this_processor(tmp_path, monkeypatch, machine, flag):
    compiler, given = tmp_path / "cc", tmp_path / "given"
    compiler.write_text(f'#!/bin/sh\necho "$@" > {given}\necho no >&2\nexit 1\n')
    compiler.chmod(0o700)
    source = tmp_path / "source.c"
    source.write_text("")
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(OSError, match=r"cannot compile source\.c: \['no'\]"):
        compile_library("source", source, {"SIZE": 3})
    assert {flag, "-DSIZE=3"} < set(given.read_text().split())
