"""The picture of a run: bars of ratio by model, and a step's time as it grows, over its floor."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastsgd.bench.errors import BenchError
from fastsgd.bench.rules import RULES
from fastsgd.bench.scaling import WIDTH

# Mid-tones, to be read on white and on black: the background is left clear. Hues by Okabe and Ito,
# which colour-blind readers tell apart; a lighter one is a variant of the rule of that hue.
TEXT = "#7d828a"
FAINT = "#7d828a40"
COLORS = {
    "sgd": "#0072b2",
    "momentum": "#d55e00",
    "nesterov": "#eba46f",
    "adamw": "#009e73",
    "adam": "#5cc4a4",
    "adamw-amsgrad": "#a3dcca",
    "rmsprop": "#cc79a7",
    "adagrad": "#e69f00",
}
COLOR_OF = {RULES[name].title: color for name, color in COLORS.items()}
OURS, STOCK = COLORS["sgd"], COLORS["momentum"]
MARKERS = "os^Dv<>p"  # one for each rule
LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": TEXT}
WIDTH_INCHES, HEIGHT_INCHES = 8.0, 4.4
BAR_INCHES = 0.075
LABELLED_BARS = 24  # more leave no room for numbers
# Where bars begin, below 1, so that those of equal times are seen.
LEFT_OF_1 = 0.6

Record = Mapping[str, Any]


def save(path: Path, document: Record) -> None:
    """Draw what `report.document` tells, and write the file, in the format of its suffix.

    Raises:
        BenchError: If it has no race of the sections that are drawn.
    """
    bars, curves = (
        [row for row in document.get(name, []) if row["stock_over_ours"] is not None]
        for name in ("steps", "scaling")
    )
    if not bars and not curves:
        raise BenchError("There is nothing to draw: no race of the sections steps and scaling.")
    # A Figure of its own, without pyplot, needs no display and leaves the caller's settings alone.
    figure = Figure(figsize=(WIDTH_INCHES, height(bars, curves)), layout="constrained")
    figure.patch.set_alpha(0)
    if bars and curves:
        halves = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
        draw_bars(halves[0], bars)
        draw_curves(halves[1].subplots(2, 1), curves)
    elif bars:
        draw_bars(figure, bars)
    else:
        draw_curves(figure.subplots(1, 2), curves)
    figure.supxlabel(made_on(document), x=0.99, ha="right", color=TEXT, fontsize=7)
    svg = path.suffix.lower() == ".svg"
    with rc_context({"svg.hashsalt": "fastsgd"}):  # the same run, the same file
        figure.savefig(path, dpi=200, metadata={"Date": None} if svg else None)


def height(bars: Sequence[Record], curves: Sequence[Record]) -> float:
    """Inches, for so many bars and the gaps between shapes."""
    places = len(bars) + 2 * len({row["shape"] for row in bars})
    return max(HEIGHT_INCHES if curves else HEIGHT_INCHES / 2, 1.6 + BAR_INCHES * places)


def made_on(document: Record) -> str:
    """Where and when the numbers were found."""
    on = document["cpu"] if document.get("device", "CPU") == "CPU" else document["device"]
    return f"{on}, torch {document['torch']}, {document['date'][:10]}"


def draw_bars(figure: FigureBase, rows: Sequence[Record]) -> None:
    """Draw a bar a row, the rows of a shape side by side, and the line at 1."""
    axes = figure.subplots()
    titles = [title for title in COLOR_OF if any(row["what"] == title for row in rows)]
    least = min(row["stock_over_ours"] for row in rows)
    left = LEFT_OF_1 * min(1, least)
    place, middles = 0.0, {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [
            row for title in titles for row in rows if (row["shape"], row["what"]) == (shape, title)
        ]
        ratios = [row["stock_over_ours"] for row in own]
        bars = axes.barh(
            [place + number for number in range(len(own))],
            [ratio - left for ratio in ratios],
            left=left,
            height=0.86,
            color=[COLOR_OF[row["what"]] for row in own],
        )
        if len(rows) <= LABELLED_BARS:
            numbers = [f"{ratio:.3g}" for ratio in ratios]
            axes.bar_label(bars, numbers, padding=3, fontsize=8, color=TEXT)
        middles[shape] = place + (len(own) - 1) / 2
        place += len(own) + 1.5
    axes.set_xscale("log")
    axes.margins(x=0.06, y=0.01)
    axes.set_xlim(left=left)
    axes.invert_yaxis()
    axes.axvline(1, color=TEXT, linewidth=1.5, linestyle="--")
    axes.set_yticks(list(middles.values()), list(middles))
    axes.tick_params(axis="y", length=0)
    label_ticks(axes.xaxis, lambda value: f"{value:g}")
    style(axes, "Time of torch.optim / fastsgd", "ratio of times; at 1 both take as long", "x")
    legend = [Line2D([], [], color=COLOR_OF[t], marker="s", ls="", label=t) for t in titles]
    # Below, where no bar can be.
    figure.legend(handles=legend, loc="outside lower left", ncols=3, handletextpad=0.2, **LEGEND)


def draw_curves(panels: Iterable[Axes], rows: Sequence[Record]) -> None:
    """Draw the times of ours and of stock's best, and the floor, by tensors and by elements."""
    titles = list(dict.fromkeys(row["what"] for row in rows))
    what = titles[0] if len(titles) == 1 else "a step"
    many = [row for row in rows if row["elements"] == WIDTH * row["tensors"]]
    one = [row for row in rows if row["tensors"] == 1]
    by_tensors, by_elements = panels
    for axes, points, by in ((by_tensors, many, "tensors"), (by_elements, one, "elements")):
        for title, marker in zip(titles, MARKERS, strict=False):
            draw_rule(axes, [row for row in points if row["what"] == title], by, marker)
        axes.set_xscale("log")
        axes.set_yscale("log")
        label_ticks(axes.xaxis, amount)
        label_ticks(axes.yaxis, duration)
    style(by_tensors, f"Time of {what}, many tensors", f"tensors of {WIDTH} elements", "both")
    style(by_elements, f"Time of {what}, one tensor", "elements", "both")
    legend = [
        Line2D([], [], color=STOCK, label="torch.optim's best"),
        Line2D([], [], color=OURS, label="fastsgd"),
        Line2D([], [], color=TEXT, linestyle=":", label="bandwidth floor"),
    ]
    if len(titles) > 1:
        rules = zip(titles, MARKERS, strict=False)
        legend += [Line2D([], [], color=TEXT, marker=m, ls="", label=title) for title, m in rules]
    by_tensors.legend(handles=legend, **LEGEND)


def draw_rule(axes: Axes, rows: Sequence[Record], by: str, marker: str) -> None:
    """Draw the three curves of one rule."""
    x = [row[by] for row in rows]
    races = [best_race(row) for row in rows]
    ours = [race["ours_us"] for race in races]
    floor = [us * row["floor_over_ours"] for us, row in zip(ours, rows, strict=True)]
    axes.plot(x, floor, color=TEXT, linestyle=":", linewidth=2)
    axes.plot(x, [race["rival_us"] for race in races], color=STOCK, marker=marker, markersize=4)
    axes.plot(x, ours, color=OURS, marker=marker, markersize=4)


def best_race(row: Record) -> Record:
    """The race with stock's best."""
    races: list[Record] = [rival["race"] for rival in row["rivals"] if rival["race"]]
    return min(races, key=lambda race: float(race["ratio"]["median"]))


def label_ticks(axis: Axis, words: Callable[[float], str]) -> None:
    """Label a logarithmic axis at 1, 10, 100 ..., a short one at 1, 2, 5 ..."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_locator(NullLocator())


def amount(value: float) -> str:
    """A number of things."""
    return in_units(value, {1e9: " G", 1e6: " M", 1e3: " k", 1: ""})


def duration(microseconds: float) -> str:
    """A time."""
    return in_units(microseconds, {1e6: " s", 1e3: " ms", 1: " µs", 1e-3: " ns"})


def in_units(value: float, units: Mapping[float, str]) -> str:
    """A value in the largest unit that it has one of."""
    size = next((size for size in units if value >= size), min(units))
    return f"{value / size:g}{units[size]}"


def style(axes: Axes, title: str, label: str, grid: Literal["x", "both"]) -> None:
    """Give a panel its title, the name of its horizontal axis, and a quiet frame."""
    axes.set_facecolor("none")
    axes.spines[["top", "right", *(["left"] if grid == "x" else [])]].set_visible(False)
    axes.spines[:].set_color(TEXT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=TEXT, labelcolor=TEXT, labelsize=8)
    axes.set_title(title, loc="left", color=TEXT, fontweight="bold", fontsize=10)
    axes.set_xlabel(label, color=TEXT, fontsize=8)
