"""The results in words and in numbers: an aligned table, and JSON."""

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastsgd
from fastsgd import _C
from fastsgd.bench.contest import Rival, Row, Settings
from fastsgd.bench.measure import Race
from fastsgd.bench.memory import Memory
from fastsgd.bench.sections import GROUPED, MANY_THREADS
from fastsgd.bench.shapes import Shape

COLUMNS = "{:<19}{:<17}{:>11}  {:<18}{:<16}{:>9}{:>9}{:>10}{:>9}  {}"
HEADINGS = (
    *("shape", "step", "stock/ours", "quartiles", "best stock", "stock µs", "ours µs"),
    *("MB moved", "of copy", ""),
)
HEADER = COLUMNS.format(*HEADINGS).rstrip()
# What 465 groups may cost over one.
GROUPS_LIMIT = 1.15


@dataclass
class Results:
    """Everything that was found.

    Attributes:
        rows: The main table, by the heading of each part.
        opponents: A word on each opponent: its version, or why it was left out.
        groups: The races of many groups against one.
        oversubscribed: The races of many threads against one.
        memory: What steps take from memory.
        skipped: What --quick had no time for.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    opponents: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Race] = field(default_factory=dict)
    oversubscribed: dict[str, Race] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def machine(device: torch.device) -> dict[str, Any]:
    """Where the numbers hold: versions, the CPU, how many threads, and the device."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastsgd": fastsgd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "load": os.getloadavg()[0],
        "isa": _C.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def heading(settings: Settings) -> str:
    """What is compared, and where."""
    m = machine(settings.device)
    counts = " and ".join(map(str, settings.counts))
    on = "" if m["device"] == "CPU" else f"{m['device']}, with "
    lines = [
        f"fastsgd {m['fastsgd']} ({m['isa']}) and torch {m['torch']} on {on}{m['cpu']}, "
        f"{m['cores']} cores",
        f"ours at {m['threads']} threads, stock at its best of {counts}; higher is better",
    ]
    if m["load"] > 0.5:
        lines.append(f"The load is {m['load']:.1f}: a step that shares its cores is not its own.")
    return "\n".join(lines)


def cpu_model() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def model_line(name: str, shape: Shape) -> str:
    """What was found of the user's own model."""
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in shape.dtypes}))
    return (
        f"{name}: {shape.tensors:,} tensors, {shape.elements:,} elements, {dtypes}; groups: "
        f"{len(shape.groups):,}, with the options of the rules"
    )


def line(row: Row) -> str:
    """One row of the table."""
    moved = digits(row.bytes_moved / 1e6) if row.bytes_moved else ""
    fraction = "" if row.copy_fraction is None else f"{row.copy_fraction:.0%}"
    note = "; ".join(f"{mode}: {count:,} elements wrong" for mode, count in row.wrong.items())
    cells = cells_of(row.best, "no mode is right" if row.rivals else "not raced")
    shape = row.shape if len(row.shape) < 19 else f"{row.shape[:17]}…"
    return COLUMNS.format(shape, row.what, *cells, moved, fraction, note).rstrip()


def opponent_lines(row: Row) -> Iterable[str]:
    """A line for each opponent of a row, no part of the best of stock, and for each failure."""
    for name, best in row.best_opponents.items():
        yield COLUMNS.format("", f"  {name}", *cells_of(best, "wrong"), "", "", "").rstrip()
    for name, failure in row.failures.items():
        yield COLUMNS.format("", f"  {name}", failure, *[""] * 7).rstrip()


def cells_of(rival: Rival | None, otherwise: str) -> list[str]:
    """The columns that tell of a race; `otherwise` where there was none."""
    if rival is None or rival.race is None:
        return [otherwise, "", "", "", ""]
    ratio = rival.race.ratio
    return [
        f"{ratio.median:.2f}",
        f"{ratio.first_quartile:.2f} .. {ratio.third_quartile:.2f}",
        f"{rival.mode}, {rival.threads} thr",
        digits(rival.race.rival_us),
        digits(rival.race.ours_us),
    ]


def digits(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def opponents_line(words: dict[str, str]) -> str:
    """Who else is raced, and who is not."""
    return "opponents: " + ", ".join(f"{name} {word}" for name, word in words.items())


def groups_lines(races: dict[str, Race]) -> Iterable[str]:
    """Times with a group for each tensor over times with one for all."""
    for title, race in races.items():
        within = "" if race.ratio.median <= GROUPS_LIMIT else f", more than {GROUPS_LIMIT}"
        yield against(title, f"{GROUPED.tensors} groups / 1 group", race) + within


def oversubscribed_lines(races: dict[str, Race]) -> Iterable[str]:
    """Times with many threads over times with one."""
    for name, race in races.items():
        who = "ours" if name == "fastsgd" else f"stock {name}"
        yield against(who, f"{MANY_THREADS} threads / 1 thread", race)


def against(who: str, what: str, race: Race) -> str:
    """One optimizer in two ways."""
    return (
        f"{who:<17} {what} {race.ratio.median:>7.2f}"
        f"   ({race.ratio.first_quartile:.2f} .. {race.ratio.third_quartile:.2f};"
        f" {digits(race.rival_us)} µs / {digits(race.ours_us)} µs)"
    )


def memory_lines(found: Iterable[Memory]) -> Iterable[str]:
    """What is held once warm, and what a warm step takes."""
    columns = "{:<19}{:<17}{:<10}{:>12}{:>12}{:>12}{:>12}{:>18}"
    yield columns.format(
        *("shape", "step", "", "calls", "peak, MB", "held, MB", "states, MB", "gradients, MB")
    )
    for m in found:
        calls = "no compiler" if m.allocations is None else f"{m.allocations:g}"
        sizes = [m.peak_bytes, m.held_bytes, m.state_bytes, m.gradient_bytes]
        cells = ["not told" if size is None else f"{size / 1e6:.1f}" for size in sizes]
        yield columns.format(m.shape, m.what, m.mode, calls, *cells)


def document(results: Results, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """All that was measured, as JSON takes it."""
    return {
        **machine(device),
        "options": {name: plain(value) for name, value in options.items()},
        "opponents": results.opponents,
        **{name: [record(row) for row in rows] for name, rows in results.rows.items()},
        "groups": {title: asdict(race) for title, race in results.groups.items()},
        "oversubscribed": {name: asdict(race) for name, race in results.oversubscribed.items()},
        "memory": [asdict(m) for m in results.memory],
        "skipped": results.skipped,
    }


def plain(option: object) -> object:
    """An option as JSON takes it."""
    return str(option) if isinstance(option, (Path, torch.device)) else option


def record(row: Row) -> dict[str, Any]:
    """A row, with what follows from it."""
    return {
        **asdict(row),
        "stock_over_ours": median(row.best),
        "opponents_over_ours": {name: median(best) for name, best in row.best_opponents.items()},
        "copy_fraction": row.copy_fraction,
        "floor_over_ours": row.floor,
    }


def median(rival: Rival | None) -> float | None:
    """A rival's ratio; None where there was no race."""
    return None if rival is None or rival.race is None else rival.race.ratio.median
