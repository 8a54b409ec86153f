"""What is run, in which order; each row is printed as it is found."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter

from fastsgd.bench import one_pass, report, sections
from fastsgd.bench.contest import Row, Settings
from fastsgd.bench.contestants import Inputs
from fastsgd.bench.memory import memory
from fastsgd.bench.opponents import Opponent
from fastsgd.bench.report import Results
from fastsgd.bench.rules import RULES, Rule
from fastsgd.bench.shapes import Shape
from fastsgd.bench.steps import step_row

SECTIONS = {
    "steps": "step() on gradients that stay where they are",
    "scaling": "the same, by the number of tensors, and by the elements of one tensor",
    "fresh": "step() on gradients that a backward has just made, in memory that is new to it",
    "zero-grad": "zero_grad() on gradients that a backward has just made",
    "one-pass": "clip, step, average, zero: one step() of ours, four calls of stock's",
    "groups": "step() of 465 tensors, each in a group of its own or all in one; both ours",
    "memory": "what steps hold, and what a warm one takes right after a backward",
    # Last: it leaves threads behind.
    "oversubscribed": "SGD step() of 2000x64 with more threads than cores",
}
# The seconds before a deadline that are kept for the sections after each of these.
RESERVED_SECONDS = {"steps": 25.0, "scaling": 15.0}

Case = tuple[Shape, Rule]


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        sections: Names of SECTIONS.
        cases: The rows of the section `steps`.
        scaling: The rows of the section `scaling`.
        opponents: Who else is raced in the section `steps`,
        words: and a word on each of those, and on those who are not.
        chained: The shapes of the section `one-pass`; None for all.
        deadline: When, on `perf_counter`, nothing more is begun.
    """

    sections: Sequence[str]
    cases: Sequence[Case]
    scaling: Sequence[Case] = ()
    opponents: Sequence[Opponent] = ()
    words: dict[str, str] = field(default_factory=dict)
    chained: Sequence[str] | None = None
    deadline: float = float("inf")

    def races(self, settings: Settings) -> int:
        """How often the progress bar will tick."""
        rivals = {
            "steps": sum(self.entrants(*case) for case in self.cases),
            "scaling": sum(len(rule.rivals) for _, rule in self.scaling),
            "fresh": sum(len(rule.rivals) for rule in sections.FRESH_RULES),
            "zero-grad": 2 * len(RULES["sgd"].rivals),
            "one-pass": one_pass.rivals(self.chained),
        }
        ticks = sum(count for name, count in rivals.items() if name in self.sections)
        others = {"memory": 1, "groups": len(sections.GROUP_RULES), "oversubscribed": 2}
        return ticks * len(settings.counts) + sum(others.get(name, 0) for name in self.sections)

    def entrants(self, shape: Shape, rule: Rule) -> int:
        """How many optimizers a row of the section `steps` has beside ours."""
        opponents = sum(opponent.enters(rule, shape) for opponent in self.opponents)
        return len(rule.rivals) + opponents


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
        elif name == "groups":
            results.groups = sections.groups(settings)
            say_all(report.groups_lines(results.groups), say)
        elif name == "oversubscribed":
            results.oversubscribed = sections.oversubscribed(settings)
            say_all(report.oversubscribed_lines(results.oversubscribed), say)
        else:
            if name == "steps" and plan.words:
                results.opponents = plan.words
                say(report.opponents_line(plan.words))
            say(report.HEADER)
            rows = results.rows.setdefault(name, [])
            for row in rows_of(name, plan, settings, results.skipped):
                rows.append(row)
                say(report.line(row))
                say_all(report.opponent_lines(row), say)
    if results.skipped:
        say(f"\nnot run, as the time of --quick was over: {', '.join(results.skipped)}")
    return results


def rows_of(name: str, plan: Plan, settings: Settings, skipped: list[str]) -> Iterator[Row]:
    """The rows of one section."""
    if name == "fresh":
        yield from sections.fresh_rows(settings)
    elif name == "zero-grad":
        yield from sections.zero_grad_rows(settings)
    elif name == "one-pass":
        yield from one_pass.one_pass_rows(settings, plan.chained)
    else:
        yield from step_rows(name, plan, settings, skipped)


def step_rows(name: str, plan: Plan, settings: Settings, skipped: list[str]) -> Iterator[Row]:
    """The rows of `steps` or `scaling`, but for those that would end after the deadline."""
    scaling = name == "scaling"
    deadline = plan.deadline - (0.0 if name == plan.sections[-1] else RESERVED_SECONDS[name])
    # A row takes about as long as the one before, or as its elements in the slowest large row.
    took = seconds_an_element = 0.0
    for shape, cases in groupby(plan.scaling if scaling else plan.cases, key=lambda case: case[0]):
        inputs: Inputs | None = None
        for _, rule in cases:
            start = perf_counter()
            if start + max(took, seconds_an_element * shape.elements) > deadline:
                skipped.append(f"{shape.name} {rule.name}")
                continue
            inputs = inputs or Inputs.random(shape, settings.device)
            opponents = () if scaling else plan.opponents
            yield step_row(inputs, rule, settings, opponents, floor=scaling)
            took = perf_counter() - start
            if shape.large:
                seconds_an_element = max(seconds_an_element, took / shape.elements)


def say_all(lines: Iterable[str], say: Callable[[str], object]) -> None:
    """Print lines."""
    for line in lines:
        say(line)
