"""Compile C at run time with the machine's own compiler, for the machine's own processor, and load it."""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fairseq_rkm.ops.compilation.build_cache import built

FLAGS = ("-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
ARM = "aarch64"
"""The machine's name there. clang does not know ``-march=native`` on it."""


def compile_library(name: str, source: Path, macros: Mapping[str, int | str]) -> ctypes.CDLL:
    """The library compiled from a file, from the user's cache or made now.

    Args:
        name: the library's name in the cache.
        source: the C file.
        macros: names and values to define.

    Raises:
        OSError: there is no compiler, or it fails (its last line is shown), or its output has no place.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler is installed")
    own = "-mcpu=native" if platform.machine() == ARM else "-march=native"
    command = [compiler, own, *FLAGS, *(f"-D{macro}={value}" for macro, value in macros.items())]

    def build(path: Path) -> None:
        # Temporary files stand beside the result; if this process is killed, they are swept with its folder.
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
    """The processor's description; the machine code depends on it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
