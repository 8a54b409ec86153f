"""The results in words and in numbers: an aligned table, and JSON."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastsgd
from fastsgd import _C
from fastsgd.bench.contest import Row
from fastsgd.bench.measure import Race
from fastsgd.bench.memory import Memory
from fastsgd.bench.sections import MANY_THREADS

COLUMNS = "{:<13}{:<19}{:>11}  {:<18}{:<15}{:>11}{:>11}{:>10}{:>9}  {}"
HEADINGS = (
    *("shape", "step", "stock/ours", "quartiles", "best stock", "stock µs", "ours µs"),
    *("MB moved", "of copy", ""),
)
HEADER = COLUMNS.format(*HEADINGS).rstrip()


@dataclass
class Results:
    """Everything that was found.

    Attributes:
        rows: The main table, by the heading of each part.
        oversubscribed: The races of many threads against one.
        memory: What steps take from memory.
        skipped: What --quick had no time for.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    oversubscribed: dict[str, Race] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def machine() -> dict[str, Any]:
    """Where the numbers hold: versions, the CPU, and how many threads."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastsgd": fastsgd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "isa": _C.instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def heading() -> str:
    """What is compared, and where."""
    m = machine()
    counts = " and ".join(map(str, sorted({1, m["threads"]})))
    lines = [
        f"fastsgd {m['fastsgd']} ({m['isa']}) and torch {m['torch']} on {m['cpu']}, "
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


def line(row: Row) -> str:
    """One row of the table."""
    moved = f"{row.bytes_moved / 1e6:,.0f}" if row.bytes_moved else ""
    fraction = "" if row.copy_fraction is None else f"{row.copy_fraction:.0%}"
    note = "; ".join(f"{mode}: {count:,} elements wrong" for mode, count in row.wrong.items())
    best = row.best
    if best is None or best.race is None:
        cells = ["no mode is right", "", "", "", "", moved, fraction]
        return COLUMNS.format(row.shape, row.what, *cells, note).rstrip()
    race = best.race
    spread = f"{race.ratio.first_quartile:.2f} .. {race.ratio.third_quartile:.2f}"
    cells = [
        f"{race.ratio.median:.2f}",
        spread,
        f"{best.mode}, {best.threads} thr",
        microseconds(race.rival_us),
        microseconds(race.ours_us),
        moved,
        fraction,
    ]
    return COLUMNS.format(row.shape, row.what, *cells, note).rstrip()


def microseconds(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def oversubscribed_lines(races: dict[str, Race]) -> Iterable[str]:
    """Times with many threads over times with one."""
    for name, race in races.items():
        who = "ours" if name == "fastsgd" else f"stock {name}"
        yield (
            f"{who:<14} {MANY_THREADS} threads / 1 thread {race.ratio.median:>7.2f}"
            f"   ({race.ratio.first_quartile:.2f} .. {race.ratio.third_quartile:.2f};"
            f" {microseconds(race.rival_us)} µs / {microseconds(race.ours_us)} µs)"
        )


def memory_lines(found: Iterable[Memory]) -> Iterable[str]:
    """What a warm step takes."""
    columns = "{:<13}{:<10}{:>20}{:>26}{:>16}"
    yield columns.format(
        "shape", "", "malloc calls a step", "peak beyond what was, MB", "gradients, MB"
    )
    for m in found:
        calls = "no C compiler" if m.allocations is None else f"{m.allocations:g}"
        peak = "not told" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:.1f}"
        yield columns.format(m.shape, m.mode, calls, peak, f"{m.gradient_bytes / 1e6:.1f}")


def document(results: Results, options: dict[str, Any]) -> dict[str, Any]:
    """All that was measured, as JSON takes it."""
    return {
        **machine(),
        "options": options,
        **{name: [record(row) for row in rows] for name, rows in results.rows.items()},
        "oversubscribed": {name: asdict(race) for name, race in results.oversubscribed.items()},
        "memory": [asdict(m) for m in results.memory],
        "skipped": results.skipped,
    }


def record(row: Row) -> dict[str, Any]:
    """A row, with what follows from it."""
    best = row.best
    found = None if best is None or best.race is None else best.race.ratio.median
    return {**asdict(row), "stock_over_ours": found, "copy_fraction": row.copy_fraction}
