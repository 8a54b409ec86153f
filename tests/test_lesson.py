"""The lesson in examples: both languages run, as scripts and as notebooks, and what they say holds.

What is asked of one run is asked of both, as their numbers are compared.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import math
import re
import runpy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsgd

pyplot = pytest.importorskip("matplotlib.pyplot")

ROOT = Path(__file__).parent.parent
LESSON = ROOT / "examples" / "lesson"
NAMES = ["lesson", "lesson_ko"]
PRICES = pytest.approx([2, 0.5, 1, 3], abs=2e-3)  # of a kilometre, a minute, a bag, and getting in


@dataclass
class Run:
    """What a script has printed, its names at the end, and the data of each figure's curves."""

    text: str
    names: dict[str, Any]
    figures: list[list[list[float]]]

    def learned(self, optimizer: str) -> list[list[float]]:
        """The parameters in each line that begins with this optimizer's name."""
        lines = re.findall(rf"^{optimizer} .*learned (.*)$", self.text, re.MULTILINE)
        return [[float(number) for number in line.split()] for line in lines]


def play(execute: Callable[[], dict[str, Any]]) -> Run:
    """Run a script without a display; a letter that the font of a figure lacks is an error."""
    figures = []

    def show() -> None:
        figure = pyplot.gcf()
        figure.canvas.draw()
        figures.append([list(line.get_ydata()) for line in figure.gca().lines])
        pyplot.close(figure)

    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", message="Glyph .* missing")
        pyplot.switch_backend("Agg")
        patch.setattr(pyplot, "show", show)
        names = execute()
    return Run(printed.getvalue(), names, figures)


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Both scripts, run as a user runs them."""
    paths = {name: str(LESSON / f"{name}.py") for name in NAMES}
    return {
        name: play(lambda path=path: runpy.run_path(path, run_name="__main__"))
        for name, path in paths.items()
    }


@pytest.fixture
def run(runs: dict[str, Run]) -> Run:
    """The English one."""
    return runs["lesson"]


def numbers(text: str) -> list[str]:
    """All numbers of a text, as they are written."""
    return re.findall(r"[-+]?0x[\w.+-]+|[-+]?\d[\d.]*(?:e[-+]\d+)?", text)


class Wordless(ast.NodeTransformer):
    """Takes away docstrings and the words that are printed."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            for part in ast.walk(node):
                if isinstance(part, ast.JoinedStr):
                    part.values = [v for v in part.values if not isinstance(v, ast.Constant)]
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value = ""
        return node


def test_code_of_both_languages() -> None:
    code = [
        ast.dump(Wordless().visit(ast.parse((LESSON / f"{name}.py").read_text("utf-8"))), indent=1)
        for name in NAMES
    ]
    assert code[0] == code[1]


def test_numbers_of_both_languages(runs: dict[str, Run]) -> None:
    english, korean = (numbers(runs[name].text) for name in NAMES)
    assert len(english) > 100
    assert english == korean


# Notebooks.


def made(name: str) -> str:
    """The notebook's text, made anew."""
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("notebooks", LESSON / "notebooks.py")
    assert spec and spec.loader
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    return notebooks.notebook(LESSON / f"{name}.py")


@pytest.mark.parametrize("name", NAMES)
def test_notebook_in_step(name: str) -> None:
    there = (LESSON / f"{name}.ipynb").read_text("utf-8")
    assert there == made(name), "run `python examples/lesson/notebooks.py`"


@pytest.mark.parametrize("name", NAMES)
def test_notebook(name: str, runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own puts figures into outputs
    notebook = nbformat.read(LESSON / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=60, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert "".join(output.get("text", "") for output in outputs) == runs[name].text
    assert {output.get("name") for output in outputs if "text" in output} == {"stdout"}
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == len(runs[name].figures) == 4


# What the text claims, section by section.


def test_gradients_add_up(run: Run) -> None:
    grads = re.findall(r"w\.grad = (\S+)", run.text)
    assert grads == ["-4", "-4", "-8", "-12", "None", "-4"]


def test_a_forgotten_zero_grad(run: Run) -> None:
    cleared, forgotten = run.names["cleared"], run.names["forgotten"]
    assert cleared[:2] == forgotten[:2] == pytest.approx([1, 1.4])
    assert cleared == sorted(cleared) and cleared[-1] == pytest.approx(3, abs=1e-3)
    for swing in (forgotten[:15], forgotten[-15:]):  # about a period
        assert min(swing) == pytest.approx(1, abs=0.1)
        assert max(swing) == pytest.approx(5, abs=0.1)
    assert [len(curves) for curves in run.figures] == [3, 1, 3, 3]
    assert run.figures[0][:2] == [cleared, forgotten]


def test_by_hand(run: Run) -> None:
    assert "\nloss = 69\nW.grad = -45, b.grad = -16\nW = 2.25, b = 0.8\n" in run.text
    assert re.search(r"^epoch 1000: loss = \S+, W = 2\.0000, b = 3\.0000$", run.text, re.MULTILINE)
    losses = run.names["losses"]
    assert losses[:700] == sorted(losses[:700], reverse=True)
    assert losses[-1] < 1e-9
    evenly = [losses[epoch + 100] / losses[epoch] for epoch in (100, 200, 300, 400, 500)]
    assert evenly == pytest.approx([evenly[0]] * 5, rel=0.01)
    assert losses[-1] > losses[-100] / 2
    assert run.figures[1] == [losses]


def test_bits(run: Run) -> None:
    ours, stock = run.names["ours"], run.names["stock"]
    assert len(ours) == 1000 and "all 1000 losses equal: True\n" in run.text
    assert [loss.hex() for loss in ours] == [loss.hex() for loss in stock]
    assert ours == run.names["losses"]


def test_stock_takes_our_place(run: Run) -> None:
    """`torch.optim.SGD` could be written anywhere but in the last section, and print the same."""
    source = (LESSON / "lesson.py").read_text("utf-8").partition("# ## 9.")[0]
    source, replaced = re.subn(r"fastsgd\.SGD(?=[(,])", "torch.optim.SGD", source)
    assert replaced > 5
    names: dict[str, Any] = {}
    text = play(lambda: exec(source, names) or names).text
    assert text.count("\n") > 40
    assert run.text.startswith(text)


def test_learning_rates(run: Run) -> None:
    small, right, large = (run.names["losses_of"][lr] for lr in (0.001, 0.05, 0.13))
    assert small == sorted(small, reverse=True) and small[-1] > 10
    assert right == sorted(right, reverse=True) and right[-1] < 0.2
    assert large == sorted(large) and large[-1] > 1e6
    assert run.figures[2] == [small, right, large]
    on = run.names["train_by_hand"](fastsgd.SGD, 0.13, epochs=1000)
    assert math.inf in on and math.isnan(on[-1])


def test_module(run: Run) -> None:
    line, copy = run.names["line"], run.names["copy"]
    assert [p.item() for p in line.parameters()] == pytest.approx([2, 3], abs=1e-3)
    assert all(map(torch.equal, line.parameters(), copy.parameters()))
    assert "5 km: 13.000\n5 km, says the copy: 13.000\n" in run.text


def test_many_variables(run: Run) -> None:
    rides, prices = run.names["rides"], run.names["prices"]
    assert torch.equal(rides @ torch.tensor([[2], [0.5], [1]]) + 3, prices)
    (learned,) = run.learned("SGD")
    assert learned[:3] == pytest.approx([2, 0.5, 1], abs=0.2)
    assert learned != pytest.approx([2, 0.5, 1, 3], abs=0.1)
    gradients = re.search(r"^gradients: (\S+) (\S+) (\S+)$", run.text, re.MULTILINE)
    assert gradients
    kilometres, minutes, luggage = (abs(float(gradient)) for gradient in gradients.groups())
    assert minutes > 3 * max(kilometres, luggage)


def test_learning_rate_of_many_variables(run: Run) -> None:
    names = run.names
    model = names["begin"]()
    optimizer = fastsgd.SGD(model.parameters(), lr=0.004)
    losses = names["train"](model, names["rides"], names["prices"], optimizer, epochs=100)
    assert losses[-1] > 100 * losses[0]


def test_adam(run: Run) -> None:
    assert "\nAdam's first moves: 0.1000 0.1000 0.1000\n" in run.text
    assert run.learned("Adam") == [PRICES]
    losses = run.names["adam_losses"]
    assert losses[-1] < 1e-9 < run.names["sgd_losses"][-1]
    curves = [run.names[f"{name}_losses"] for name in ("sgd", "adam", "rmsprop")]
    assert run.figures[3] == curves


def test_rmsprop(run: Run) -> None:
    first, last = run.learned("RMSprop")
    assert first == pytest.approx([2, 0.5, 1, 3], abs=0.05)
    assert last == PRICES
    losses = run.names["rmsprop_losses"]
    leaps = [epoch for epoch in range(500, 1000) if losses[epoch] > 10 * min(losses[:epoch])]
    assert len(leaps) > 10
    assert run.names["more_losses"][-1] < 1e-6


def test_outlook(run: Run) -> None:
    four, two = run.names["four_lines"], run.names["two_lines"]
    assert len(four) == len(two) == 200 and four[-1] < four[0] / 100
    assert two == pytest.approx(four, rel=1e-4)
    norms = [float(norm) for norm in re.findall(r"gradient norm (\S+)", run.text)]
    assert len(norms) == 4 and norms[0] > 100 and norms[-1] < 10
    assert run.text.endswith("gradient after the step: None\n")
