"""The pages: their code runs, their links lead somewhere, and Sphinx makes a site of them.

The ``python`` blocks of a page run from top to bottom in one namespace, with what ``yours`` gives
them. A second word says where a block runs: ``python processes`` in each of two processes, in a
namespace of their own, and ``python cuda`` where there is a device. What is not to be run is no
``python`` block.
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from onepass import EXTRAS
from torch import nn

import fastsgd

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])
LINKING = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")})
LINKING += sorted(ROOT.glob("examples/**/*.md"))
BLOCK = re.compile(r"^```python(?: (?P<where>\w+))?\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^(```+).*?^\1$", re.DOTALL | re.MULTILINE)


def name(value: Any) -> str | None:
    """Return a test id."""
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the other tests': torch's own roots, as a reader has; a folder to save in."""
    monkeypatch.chdir(tmp_path)


# Code.


def yours() -> dict[str, Any]:
    """Return what the code of a page finds: imports, a model, batches that each process has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    loss_fn = nn.functional.mse_loss
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    batches = [(torch.randn(16, 8), torch.randn(16, 1)) for _ in range(4)]

    @torch.no_grad()
    def validate(model: nn.Module) -> None:
        for inputs, targets in batches:
            loss_fn(model(inputs), targets)

    return {
        "torch": torch,
        "nn": nn,
        "fastsgd": fastsgd,
        "model": model,
        "loss_fn": loss_fn,
        "batches": batches,
        "validate": validate,
    }


def run(page: Path, where: str) -> None:
    """Run the blocks of a page that have a word, or none; errors name its lines."""
    text, namespace = page.read_text(), yours()
    for block in BLOCK.finditer(text):
        if (block["where"] or "") == where:
            before = "\n" * text.count("\n", 0, block.start("code"))
            exec(compile(before + block["code"], page, "exec"), namespace)


def run_in_process(page: str, folder: str) -> None:
    """Worker: the same, beside another."""
    os.chdir(folder)
    run(Path(page), "processes")


# Each page with each of the words of its blocks.
WITH_CODE = sorted(
    {(page, where) for page in PAGES for where, _ in BLOCK.findall(page.read_text())}
)


@pytest.mark.parametrize(("page", "where"), WITH_CODE, ids=name)
def test_code(page: Path, where: str, tmp_path: Path) -> None:
    """Each block runs, and what it asserts holds."""
    if where == "processes":
        if not torch.distributed.is_available():
            pytest.skip("torch was built without distributed")
        workers.run(run_in_process, tmp_path, str(page), str(tmp_path))
    elif where == "cuda":
        if not fastsgd.cuda_available():
            pytest.skip("there is no device")
        run(page, where)
    else:
        assert not where, f"a block of {page} is to run in {where!r}, which is no place"
        run(page, where)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_block_is_overlooked(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"^\s*(?:```+|~~~+) ?python", text, re.MULTILINE)) == len(
        BLOCK.findall(text)
    )


# What is public and has something to show.
SHOWN = [name for name in fastsgd.__all__ if name not in ("__version__", "cuda_available")]


@pytest.mark.parametrize("public", SHOWN)
def test_examples_of_docstrings(public: str) -> None:
    """They run, those of methods too."""
    found = getattr(fastsgd, public)
    members = [found, *(getattr(found, name) for name in dir(found) if not name.startswith("_"))]
    ours = [each for each in members if str(getattr(each, "__module__", "")).startswith("fastsgd")]
    names = yours()
    names["input"], names["target"] = names["batches"][0]
    names["optimizer"] = fastsgd.SGD(names["model"].parameters(), ema_decay=0.9)
    names["loss_fn"](names["model"](names["input"]), names["target"]).backward()
    names["optimizer"].step()
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    for each in ours:
        doc = inspect.getdoc(each) or ""
        runner.run(parser.get_doctest(doc, names, repr(each), None, None))
    results = runner.summarize()
    assert results.attempted >= (5 if inspect.isclass(found) else 2) and not results.failed


# Links.


def anchors(page: Path) -> set[str]:
    """Return what GitHub and MyST make of the headings."""
    slugs: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_links(page: Path) -> None:
    """Those to files of this repository, and to headings there."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    inline = re.findall(r"\]\(([^)\s]+)\)", prose)
    targets = inline + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", prose)
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: {path or 'the page'} has no such heading"


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the site, in which a warning is an error."""
    for needed in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"the site needs the package {needed}")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", folder / "doctrees", "docs", folder / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_site(site: Path) -> None:
    """Each page is in it, and is led to from the first."""
    index = (site / "index.html").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        made = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / made).exists()
        assert made.name == "index.html" or f'href="{made}"' in index


@pytest.mark.parametrize("public", fastsgd.__all__)
def test_reference(site: Path, public: str) -> None:
    """Every public name has its entry, with all that a class of ours adds to ``Optimizer``."""
    text = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    found = getattr(fastsgd, public)
    wanted = [public]
    if inspect.isclass(found):
        bases = [base for base in found.__mro__ if not issubclass(torch.optim.Optimizer, base)]
        wanted += [f"{public}.{m}" for base in bases for m in vars(base) if not m.startswith("_")]
        assert len(wanted) > len(EXTRAS)
    for entry in wanted:
        assert f'id="fastsgd.{entry}"' in text, f"{entry} has no page in docs/reference"


def test_every_option_is_explained() -> None:
    text = (ROOT / "docs/one-pass.md").read_text()
    assert not [option for option in EXTRAS if f"`{option}`" not in text.partition("\n## ")[0]]
