"""A row of the results: ours, and the rivals that it was raced with."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from fastsgd.bench.check import Verdict
from fastsgd.bench.contestants import CPU
from fastsgd.bench.measure import Effort, Race, Runner, race
from fastsgd.bench.shapes import Shape


@dataclass(frozen=True)
class Rival:
    """A mode of stock's, or an opponent, at a thread count.

    Attributes:
        mode: `default`, `foreach`, `fused` or the opponent's name.
        threads: Its thread count.
        verdict: Whether it is right; None where that was not looked at.
        race: Its race with ours; None if it is wrong, for then its time means nothing.
    """

    mode: str
    threads: int
    verdict: Verdict | None
    race: Race | None


@dataclass
class Row:
    """What was found of one shape and one rule.

    Attributes:
        shape: The shape's name.
        tensors: How many tensors it has,
        elements: and how many elements.
        what: The rule, or what else was timed.
        threads: Our thread count.
        verdict: How ours compares with the reference; None where that was not looked at.
        rivals: Stock's modes.
        opponents: Other libraries' optimizers.
        failures: The modes and opponents that raised, and what.
        bytes_moved: What a step has to read and write, where it is compared with memory.
        copies: The races with a copy of memory, by its name, where it is.
        copy_bytes: What that reads and writes.
        passes: The races with a pass over as much memory in place, which reads and writes all.
    """

    shape: str
    tensors: int
    elements: int
    what: str
    threads: int
    verdict: Verdict | None = None
    rivals: list[Rival] = field(default_factory=list)
    opponents: list[Rival] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    copies: dict[str, Race] = field(default_factory=dict)
    copy_bytes: int = 0
    passes: dict[str, Race] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, what: str, threads: int, verdict: Verdict | None = None) -> "Row":
        """A row without rivals."""
        return cls(shape.name, shape.tensors, shape.elements, what, threads, verdict)

    @property
    def best(self) -> Rival | None:
        """The stock mode that comes nearest to ours, or passes it, of those that are right."""
        return best_of(self.rivals)

    @property
    def best_opponents(self) -> dict[str, Rival | None]:
        """Each opponent at its best thread count; None if it is wrong."""
        names = dict.fromkeys(rival.mode for rival in self.opponents)
        return {name: best_of([r for r in self.opponents if r.mode == name]) for name in names}

    @property
    def wrong(self) -> dict[str, int]:
        """The modes and opponents that are wrong, and how many elements are."""
        entered = (*self.rivals, *self.opponents)
        return {r.mode: r.verdict.wrong for r in entered if r.verdict and r.verdict.wrong}

    @property
    def copy_fraction(self) -> float | None:
        """Our bytes a second over those of the fastest copy."""
        return self.over_ours(self.copies, self.copy_bytes)

    @property
    def floor(self) -> float | None:
        """The least time in which memory could be read and written so, over ours."""
        if not self.passes:
            return None
        found = (self.copy_fraction, self.over_ours(self.passes, 2 * self.copy_bytes))
        return min(over for over in found if over is not None)

    def over_ours(self, races: dict[str, Race], bytes_raced: int) -> float | None:
        """The time that the fastest would take for the bytes of a step, over ours."""
        ratio = min((race.ratio.median for race in races.values()), default=None)
        return None if ratio is None else ratio * self.bytes_moved / bytes_raced


def races_of(rivals: Iterable[Rival]) -> list[Race]:
    """The races with those that are right."""
    return [rival.race for rival in rivals if rival.race]


def best_of(rivals: Sequence[Rival]) -> Rival | None:
    """Who comes nearest to ours, or passes it, of those that are right."""
    ratios = [(rival.race.ratio.median, rival) for rival in rivals if rival.race]
    return min(ratios, key=lambda pair: pair[0])[1] if ratios else None


@dataclass(frozen=True)
class Settings:
    """What holds for every row.

    Attributes:
        threads: The default thread count, which ours runs at.
        effort: How long a race is.
        tick: Called after each race, for the progress bar.
        device: Where steps are timed in the sections `steps` and `scaling`.
    """

    threads: int
    effort: Effort
    tick: Callable[[], object] = lambda: None
    device: torch.device = CPU

    @property
    def counts(self) -> list[int]:
        """The thread counts that stock runs at; a device's work is not theirs."""
        return [self.threads] if self.device.type == "cuda" else sorted({1, self.threads})

    def runner(self, call: Callable[[], object], threads: int) -> Runner:
        """A runner that is done when the device is."""
        if self.device.type == "cuda":
            return Runner(call, threads, wait=partial(torch.cuda.synchronize, self.device))
        return Runner(call, threads)

    def race(self, ours: Runner, rival: Runner, before: Iterable[Race] = ()) -> Race:
        """One race, broken off early if the rival is far behind the best of those before it."""
        best = min((other.ratio.median for other in before), default=math.inf)
        return race(ours, rival, self.effort, best)
