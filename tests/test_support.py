"""The READMEs' table of what is supported is what is found by trying it; the lists are whole."""

from __future__ import annotations

import re

import pytest
from cases import OPTIMIZERS
from source_tree import ROOT, from_source
from support import table


@from_source
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("readme", ["README.md", "README.ko.md"])
def test_table(readme: str) -> None:
    path = ROOT / readme
    made = table(korean=".ko" in readme)
    assert made in path.read_text(), f"put this into {readme}:\n{made}"


@from_source
@pytest.mark.parametrize(
    ("page", "where"),
    [
        ("README.md", "are `torch.optim`'s"),
        ("README.ko.md", "`torch.optim`에"),
        ("docs/index.md", "PyTorch's optimizers"),
        ("docs/sameness.md", "stock's bits, of"),
    ],
)
def test_every_optimizer_is_named(page: str, where: str) -> None:
    """In the paragraph, or table, with these words, which lists all."""
    paragraphs = (ROOT / page).read_text().split("\n\n")
    (listed,) = (text for text in paragraphs if where in text)
    missing = [row.name for row in OPTIMIZERS if not re.search(rf"[`.]{row.name}`", listed)]
    assert not missing, f"{page} leaves out {missing}"
