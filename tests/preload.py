"""Processes whose ``malloc`` is one of the tests': who asks for memory is counted, or refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fastsgd.bench import malloc


def skip_unless_possible() -> None:
    """Skip a test where another has to be loaded first, or asks for memory too."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a library that is loaded first is there already, as a sanitizer's runtime is")
    if "coverage" in sys.modules:
        pytest.skip("coverage's tracer asks for memory too")


def surroundings(refuses: str, folder: Path) -> dict[str, str]:
    """Return the environment of such a process; ``refuses`` is as in :func:`malloc.library`."""
    skip_unless_possible()
    library = malloc.library(refuses, folder)
    if library is None:
        pytest.skip("needs a C compiler and glibc, to stand in for malloc")
    return {"LD_PRELOAD": str(library)}
