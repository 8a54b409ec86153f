"""The READMEs' table of what is supported is what is found by trying it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import table

ROOT = Path(__file__).parents[1]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_table(readme: str) -> None:
    path = ROOT / readme
    if not path.exists():
        pytest.skip("needs the source tree")
    made = table(korean=".ko" in readme)
    assert made in path.read_text(), f"put this into {readme}:\n{made}"
