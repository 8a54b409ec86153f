"""The picture of part (d): one loss curve that is two, and the times of two optimizers."""

import math
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from fastsgd.demo.digits import Training, times_as_long

# Told apart by colour-blind readers too, and in grey: light and dark.
STOCK_COLOR = "#f0a830"
OURS_COLOR = "#0b4f8a"
TEXT_COLOR = "#333333"
BINS_PER_DECADE = 30


def save(path: Path, stock: Training, ours: Training, same: bool) -> None:
    """Draw both trainings and write the file, in the format that its suffix names."""
    # A Figure of its own, without pyplot, needs no display and leaves the caller's settings alone.
    figure = Figure(figsize=(11, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    losses, times = figure.subplots(1, 2)
    draw_losses(losses, stock, ours, same)
    draw_times(times, stock, ours)
    for axes in (losses, times):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color("#999999")
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(color="#999999", labelcolor=TEXT_COLOR)
        # Above the axes, where no curve or bar can be.
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            fontsize="small",
            handlelength=1.2,
            columnspacing=1.5,
            borderaxespad=0.3,
            borderpad=0,
            frameon=False,
            labelcolor=TEXT_COLOR,
        )
    figure.savefig(path, dpi=160)


def draw_losses(axes: Axes, stock: Training, ours: Training, same: bool) -> None:
    """Draw a broad line and a thin one on top: both are seen where they agree."""
    epochs = range(1, len(stock.epoch_losses()) + 1)
    axes.plot(
        epochs,
        stock.epoch_losses(),
        color=STOCK_COLOR,
        linewidth=7,
        marker="o",
        markersize=6,
        label=stock.name,
    )
    axes.plot(
        epochs,
        ours.epoch_losses(),
        color=OURS_COLOR,
        linewidth=1.5,
        marker="o",
        markersize=4,
        label=ours.name,
    )
    axes.set_xlim(0.5, len(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_yscale("log")
    label_ticks(axes.yaxis)
    label(
        axes,
        "Loss: the two curves are the same to the last bit" if same else "Loss: THE TWO DIFFER",
        "epoch",
        "mean cross entropy of the epoch",
    )


def draw_times(axes: Axes, stock: Training, ours: Training) -> None:
    """Draw how many steps took how long."""
    times = [[1e6 * seconds for seconds in run.step_seconds] for run in (stock, ours)]
    first = math.floor(BINS_PER_DECADE * math.log10(min(map(min, times))))
    last = math.ceil(BINS_PER_DECADE * math.log10(max(map(max, times))))
    edges = [10 ** (i / BINS_PER_DECADE) for i in range(first, last + 2)]
    for run, microseconds, color in zip(
        (stock, ours), times, (STOCK_COLOR, OURS_COLOR), strict=True
    ):
        name = f"{run.name}: median {statistics.median(microseconds):.3g} µs"
        axes.hist(microseconds, edges, color=color, alpha=0.9, label=name)
    axes.set_xscale("log")
    label_ticks(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    label(
        axes,
        f"Step time: torch.optim.SGD takes {times_as_long(stock, ours)[1]:.1f} times as long",
        "microseconds",
        "steps",
    )


def label_ticks(axis: Axis) -> None:
    """Write a logarithmic axis as 1, 10, 100 ... (a short one as 1, 2, 5 ...), not as powers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Write the title, which says what is seen, and the names of the axes."""
    axes.set_title(title, loc="left", color=TEXT_COLOR, fontweight="bold", fontsize=11, pad=28)
    axes.set_xlabel(x, color=TEXT_COLOR)
    axes.set_ylabel(y, color=TEXT_COLOR)
