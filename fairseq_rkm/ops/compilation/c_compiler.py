"""Compile C at run time with the machine's own compiler, for the machine's own processor, and load it."""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fairseq_rkm.ops.compilation.build_cache import built

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


def compile_library(name: str, source: Path, macros: Mapping[str, int | str]) -> ctypes.CDLL:
    """The library made of a file, from the user's cache or compiled now.

    Args:
        name: what to call it in the cache.
        source: the file.
        macros: names and values to define.

    Raises:
        OSError: no compiler, one that fails (with its last line), or no place for its output.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler is installed")
    command = [compiler, *FLAGS, *(f"-D{macro}={value}" for macro, value in macros.items())]

    def build(path: Path) -> None:
        # Its temporary files stand beside the result, where they go with it if this process is killed.
        environment = {**os.environ, "TMPDIR": str(path.parent)}
        result = subprocess.run(  # noqa: S603 - the user's compiler
            [*command, "-o", str(path), str(source), "-lm"],
            capture_output=True, text=True, check=False, env=environment, umask=0o077,
        )  # fmt: skip
        if result.returncode:
            raise OSError(f"{compiler} cannot compile {source.name}: {result.stderr.strip().splitlines()[-1:]}")

    inputs = [*command, source.read_text(encoding="utf-8"), _processor()]
    return ctypes.CDLL(str(built(f"{name}.so", inputs, build).path))


def _processor() -> str:
    """All that ``-march=native`` depends on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
