"""The picture of a run: what is drawn of which numbers, and that it can be read anywhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastsgd import bench
from fastsgd.bench import picture
from fastsgd.bench.rules import RULES

MACHINE = {"cpu": "A CPU", "device": "CPU", "torch": "2.13.0", "date": "2026-11-27T00:00:00+00:00"}


def row(shape: str, what: str, tensors: int, elements: int, ratio: float, ours: float) -> dict:
    """A row as `report.record` makes it, as far as it is drawn; the second rival is the best."""
    races: list[Any] = [
        {"ratio": {"median": times * ratio}, "ours_us": ours, "rival_us": times * ratio * ours}
        for times in (3, 1, 2)
    ]
    return {
        "shape": shape,
        "what": what,
        "tensors": tensors,
        "elements": elements,
        "rivals": [{"race": race} for race in (*races, None)],
        "stock_over_ours": ratio,
        "floor_over_ours": 0.5,
    }


STEPS = [
    row("lesson", "AdamW", 2, 15, 30.0, 1.0),
    row("lesson", "SGD", 2, 15, 20.0, 1.0),
    row("gpt-2", "AdamW", 148, 124_000_000, 0.5, 9.0),
    row("gpt-2", "SGD", 148, 124_000_000, 1.0, 9.0) | {"stock_over_ours": None, "rivals": []},
]
SCALING = [
    row("1x64", "AdamW", 1, 64, 9.0, 2.0),
    row("10x64", "AdamW", 10, 640, 20.0, 4.0),
    row("1x640", "AdamW", 1, 640, 8.0, 3.0),
    row("1x6400", "AdamW", 1, 6400, 7.0, 5.0),
]
DOCUMENT = {**MACHINE, "steps": STEPS, "scaling": SCALING}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *args: object, **options: object) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def panels(figure: Figure) -> dict[str, Axes]:
    """The panels, by the name of their horizontal axis."""
    return {axes.get_xlabel(): axes for axes in figure.get_axes()}


def test_a_bar_ends_at_its_ratio_and_the_line_is_at_1(tmp_path: Path, drawn: list[Figure]) -> None:
    picture.save(tmp_path / "a.png", DOCUMENT)
    (axes,) = (axes for label, axes in panels(drawn[0]).items() if label.startswith("ratio"))
    # In the order of the rules within a shape; what was not raced is not drawn.
    assert [round(bar.get_x() + bar.get_width(), 9) for bar in axes.patches] == [20, 30, 0.5]
    colors = [bar.get_facecolor() for bar in axes.patches]
    assert colors[1] == colors[2] != colors[0]
    assert all(bar.get_x() < 0.5 for bar in axes.patches)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lesson", "gpt-2"]
    assert [text.get_text() for text in axes.texts] == ["20", "30", "0.5"]
    assert axes.get_xscale() == "log" and list(axes.lines[-1].get_xdata()) == [1, 1]


def test_curves_are_of_tensors_and_of_elements(tmp_path: Path, drawn: list[Figure]) -> None:
    picture.save(tmp_path / "a.svg", DOCUMENT)
    axes = panels(drawn[0])
    found = {
        label: [(list(line.get_xdata()), list(line.get_ydata())) for line in axes[label].lines]
        for label in ("tensors of 64 elements", "elements")
    }
    # The floor, stock's best, ours.
    assert found["tensors of 64 elements"] == [
        ([1, 10], [1.0, 2.0]),
        ([1, 10], [18.0, 80.0]),
        ([1, 10], [2.0, 4.0]),
    ]
    assert found["elements"] == [
        ([64, 640, 6400], [1.0, 1.5, 2.5]),
        ([64, 640, 6400], [18.0, 24.0, 35.0]),
        ([64, 640, 6400], [2.0, 3.0, 5.0]),
    ]
    for label in found:
        assert (axes[label].get_xscale(), axes[label].get_yscale()) == ("log", "log")
    legend = axes["tensors of 64 elements"].get_legend()
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["torch.optim's best", "fastsgd", "bandwidth floor"]


def test_a_rule_has_a_marker_of_its_own(tmp_path: Path, drawn: list[Figure]) -> None:
    other = [r | {"what": "SGD"} for r in SCALING]
    picture.save(tmp_path / "a.svg", DOCUMENT | {"scaling": SCALING + other})
    axes = panels(drawn[0])["elements"]
    assert [line.get_marker() for line in axes.lines] == ["None", "o", "o", "None", "s", "s"]
    assert len(picture.MARKERS) >= len(RULES)


def test_every_rule_has_a_colour() -> None:
    assert picture.COLORS.keys() == RULES.keys()
    assert len(set(picture.COLORS.values())) == len(RULES)


@pytest.mark.parametrize(
    ("sections", "count"), [(("steps",), 1), (("scaling",), 2), (("steps", "scaling"), 3)]
)
def test_what_there_is_is_drawn(
    sections: tuple[str, ...], count: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    picture.save(tmp_path / "a.svg", MACHINE | {name: DOCUMENT[name] for name in sections})
    assert len(panels(drawn[0])) == count


def test_many_bars_make_a_higher_picture_without_numbers(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    rows = [row(f"shape {n}", rule.title, 1, 1, 2, 1) for n in range(9) for rule in RULES.values()]
    picture.save(tmp_path / "a.png", MACHINE | {"steps": rows})
    assert drawn[0].get_figheight() > 6
    assert not drawn[0].get_axes()[0].texts


@pytest.mark.parametrize(
    ("value", "text"),
    [(64, "64"), (1000, "1 k"), (2e7, "20 M"), (1e9, "1 G")],
)
def test_amounts(value: float, text: str) -> None:
    assert picture.amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "500 ns"), (1, "1 µs"), (20, "20 µs"), (5e3, "5 ms"), (1e6, "1 s"), (1e-4, "0.1 ns")],
)
def test_durations(value: float, text: str) -> None:
    assert picture.duration(value) == text


def test_the_background_is_clear(tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png", DOCUMENT)
    alpha = image.imread(tmp_path / "a.png")[..., 3]
    assert alpha.max() == 1 and (alpha == 0).mean() > 0.5
    assert alpha.shape[1] == 1600


def test_the_same_run_makes_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture.save(tmp_path / name, DOCUMENT)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


# --- The options ------------------------------------------------------------------------------


def test_an_earlier_run_is_drawn(
    tmp_path: Path, drawn: list[Figure], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found.json").write_text(json.dumps(DOCUMENT))
    for suffix, start in ((".svg", b"<?xml"), (".PNG", b"\x89PNG")):
        path = tmp_path / f"picture{suffix}"
        assert bench.main(["--from", str(tmp_path / "found.json"), "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(start)
    assert len(drawn[0].get_axes()) == 3
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "found.json is not what --json writes: "),
        ("[1]", "found.json is not what --json writes: "),
        (json.dumps(MACHINE), "There is nothing to draw: no race of the sections steps and"),
        (None, "No such file"),
    ],
)
def test_what_cannot_be_drawn(
    text: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    if text is not None:
        path.write_text(text)
    assert bench.main(["--from", str(path), "--plot", str(tmp_path / "a.svg")]) == 1
    printed = capsys.readouterr().err
    assert sentence in printed and printed.count("\n") == 1
    assert not (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--from", "a.json"], "--from goes with --plot"),
        (["--from", "a.json", "--plot", "a.svg", "--quick"], "--quick means nothing with it"),
        (["--from", "a.json", "--plot", "a.svg", "--my-model", "a:b"], "--my-model means nothing"),
        (["--from", "a.json", "--plot", "a.svg", "--json", "b.json"], "--json means nothing"),
        (["--plot", "a.gif"], "'a.gif' does not end in .svg or .png"),
        (["--plot", "no/such/folder/a.svg"], "there is no folder 'no/such/folder'"),
        (["--plot", "a.svg", "--sections", "groups"], "of which none is named"),
    ],
)
def test_options_that_mean_nothing(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert sentence in capsys.readouterr().err


def test_without_matplotlib_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["--plot", "a.svg"]) == 1
    printed = capsys.readouterr()
    assert printed.err == 'The picture needs matplotlib: run `pip install "fastsgd[bench]"`.\n'
    assert not printed.out
