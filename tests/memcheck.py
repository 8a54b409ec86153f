"""Run pytest under valgrind's memcheck, and fail at what it says of the extension.

``python tests/memcheck.py tests/test_parity.py -k momentum``: the arguments are pytest's. Python
and torch have reports of their own, which nobody here can mend: counted are those in our code, and
in what it calls of the system's libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

OURS = "/fastsgd/_C."
SYSTEMS = ("libc.so", "libm.so", "libstdc++.so", "ld-linux", "vgpreload_")

# Python's arenas would hide one object's end from the next; and valgrind does not know AVX-512.
SURROUNDINGS = {"PYTHONMALLOC": "malloc", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}


def is_ours(error: ET.Element) -> bool:
    """Tell whether the innermost place of a stack, but for the system's libraries, is ours."""
    for stack in error.iterfind("stack"):
        paths = (place.text or "" for place in stack.iterfind("frame/obj"))
        outside = (path for path in paths if not Path(path).name.startswith(SYSTEMS))
        if OURS in next(outside, ""):
            return True
    return False


def describe(error: ET.Element) -> str:
    """Return what it says, and the lines of its stacks."""
    texts = [error.findtext("what") or error.findtext("xwhat/text") or error.findtext("kind") or ""]
    for stack in error.iterfind("stack"):
        texts += [
            f"    {frame.findtext('fn')} ({frame.findtext('file')}:{frame.findtext('line')})"
            for frame in stack.iterfind("frame")
        ]
        texts.append("")
    return "\n".join(texts)


def main(arguments: list[str]) -> int:
    """Return 0 if the tests pass and nothing of ours is reported."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print(
            "memcheck: there is no valgrind: install it (on Debian or Ubuntu: apt install valgrind)"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            *(valgrind, "--quiet", "--xml=yes", f"--xml-file={report}", "--num-callers=30"),
            *("--leak-check=no", "--error-limit=no", "--undef-value-errors=yes"),
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments),
        ]
        tests = subprocess.run(command, env={**os.environ, **SURROUNDINGS}, check=False)
        errors = ET.parse(report).getroot().findall("error")
    ours = [error for error in errors if is_ours(error)]
    for error in ours:
        print(describe(error))
    print(f"memcheck: {len(ours)} of {len(errors)} reports are of the extension")
    return 1 if tests.returncode or ours else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
