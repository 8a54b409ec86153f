"""What is run, in which order; each row is printed as it is found."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from fastsgd.bench import report, sections
from fastsgd.bench.contest import Row, Settings
from fastsgd.bench.contestants import RULES, Inputs
from fastsgd.bench.memory import memory
from fastsgd.bench.report import Results
from fastsgd.bench.shapes import SHAPES
from fastsgd.bench.steps import step_row

SECTIONS = {
    "steps": "step() on gradients that stay where they are",
    "fresh": "step() on gradients that a backward has just made, in memory that is new to it",
    "zero-grad": "zero_grad() on gradients that a backward has just made",
    "memory": "momentum step on gradients that a backward has just made, once warm",
    # Last: it leaves threads behind.
    "oversubscribed": "SGD step of 2000x64 with more threads than cores",
}
# The seconds before a deadline that are kept for the sections after the main table.
RESERVED_SECONDS = 12.0


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        sections: Names of SECTIONS.
        shapes: Names of SHAPES, for the section `steps`.
        rules: Names of RULES, for the section `steps`.
        deadline: When, on `perf_counter`, nothing more is begun.
    """

    sections: Sequence[str]
    shapes: Sequence[str]
    rules: Sequence[str]
    deadline: float = float("inf")

    def races(self, settings: Settings) -> int:
        """How often the progress bar will tick."""
        rows = {"fresh": 2, "zero-grad": 2, "steps": len(self.shapes) * len(self.rules)}
        ticks = sum(count for name, count in rows.items() if name in self.sections)
        others = {"memory": 1, "oversubscribed": 2}
        return ticks * settings.contests + sum(others.get(name, 0) for name in self.sections)


def run(plan: Plan, settings: Settings, say: Callable[[str], object]) -> Results:
    """Run a plan.

    Args:
        plan: What to run.
        settings: Thread counts, how long a race is, and the progress bar's tick.
        say: Prints a line, past the progress bar.

    Raises:
        WrongResultError: If a step of ours is wrong.
    """
    results = Results()
    for name in SECTIONS:
        if name not in plan.sections:
            continue
        if perf_counter() > plan.deadline:
            results.skipped.append(name)
            continue
        say(f"\n{SECTIONS[name]}")
        if name == "memory":
            results.memory = memory(settings.threads)
            settings.tick()
            say_all(report.memory_lines(results.memory), say)
        elif name == "oversubscribed":
            results.oversubscribed = sections.oversubscribed(settings)
            say_all(report.oversubscribed_lines(results.oversubscribed), say)
        else:
            say(report.HEADER)
            rows = results.rows.setdefault(name, [])
            for row in rows_of(name, plan, settings, results.skipped):
                rows.append(row)
                say(report.line(row))
    if results.skipped:
        say(f"\nnot run, as the time of --quick was over: {', '.join(results.skipped)}")
    return results


def rows_of(name: str, plan: Plan, settings: Settings, skipped: list[str]) -> Iterator[Row]:
    """The rows of one section."""
    if name == "fresh":
        yield from sections.fresh_rows(settings)
    elif name == "zero-grad":
        yield from sections.zero_grad_rows(settings)
    else:
        yield from step_rows(plan, settings, skipped)


def step_rows(plan: Plan, settings: Settings, skipped: list[str]) -> Iterator[Row]:
    """The main table's rows, but for those that would end after the deadline."""
    deadline = plan.deadline - (RESERVED_SECONDS if len(plan.sections) > 1 else 0.0)
    # A row takes about as long as the one before, or as its elements in the slowest large row.
    took = seconds_an_element = 0.0
    for shape in map(SHAPES.__getitem__, plan.shapes):
        inputs: Inputs | None = None
        for rule in plan.rules:
            start = perf_counter()
            if start + max(took, seconds_an_element * shape.elements) > deadline:
                skipped.append(f"{shape.name} {rule}")
                continue
            inputs = inputs or Inputs.random(shape)
            yield step_row(inputs, RULES[rule], settings)
            took = perf_counter() - start
            if shape.large:
                seconds_an_element = max(seconds_an_element, took / shape.elements)


def say_all(lines: Iterable[str], say: Callable[[str], object]) -> None:
    """Print lines."""
    for line in lines:
        say(line)
