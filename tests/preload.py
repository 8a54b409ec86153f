"""A library loaded before all others, whose ``malloc`` is the one that everybody calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def surroundings(source: str, folder: Path) -> dict[str, str]:
    """Compile C code in ``folder``; return the environment of a process that it is loaded into."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and glibc, to stand in for malloc")
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a library that is loaded first is there already, as a sanitizer's runtime is")
    if "coverage" in sys.modules:
        pytest.skip("coverage's tracer asks for memory too")
    (folder / "first.c").write_text(source)
    library = folder / "first.so"
    subprocess.run(
        [compiler, "-O1", "-fno-builtin", "-shared", "-fPIC", "first.c", "-o", str(library)],
        cwd=folder,
        check=True,
    )
    return {"LD_PRELOAD": str(library)}
