"""The READMEs' table of what is supported is what is found by trying it."""

from __future__ import annotations

import pytest
from source_tree import ROOT, from_source
from support import table


@from_source
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_table(readme: str) -> None:
    path = ROOT / readme
    made = table(korean=".ko" in readme)
    assert made in path.read_text(), f"put this into {readme}:\n{made}"
