"""The tree that fastsgd is built from, for tests that need more of it than themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LACKS = not (ROOT / "setup.py").exists()
from_source = pytest.mark.skipif(LACKS, reason="needs the source tree")


def require_source() -> None:
    """Skip the module without it; with it, ``build_support`` can be imported."""
    if LACKS:
        pytest.skip("needs the source tree", allow_module_level=True)
    sys.path.append(str(ROOT))  # last, as what is imported from there may be another build
