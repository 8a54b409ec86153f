"""Processes whose ``malloc`` is one of the tests': who asks for memory is counted, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastsgd.bench import malloc

TRACER = "COVERAGE_PROCESS_CONFIG"  # by this coverage starts one, which asks for memory too


def skip_unless_possible() -> None:
    """Skip a test where another has to be loaded first."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("a library that is loaded first is there already, as a sanitizer's runtime is")


def surroundings(refuses: str, folder: Path) -> dict[str, str | None]:
    """Return what is else in the environment of such a process (None: nothing of that name).

    ``refuses`` is as in :func:`malloc.library`.
    """
    skip_unless_possible()
    library = malloc.library(refuses, folder)
    if library is None:
        pytest.skip("needs a C compiler and glibc, to stand in for malloc")
    return {"LD_PRELOAD": str(library), TRACER: None}
