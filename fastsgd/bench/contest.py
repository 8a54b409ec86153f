"""A row of the results: ours, and the rivals that it was raced with."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fastsgd.bench.check import Verdict
from fastsgd.bench.contestants import STOCK
from fastsgd.bench.measure import Effort, Race, Runner, race


@dataclass(frozen=True)
class Rival:
    """A mode of stock's at a thread count.

    Attributes:
        mode: `default`, `foreach` or `fused`.
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
        what: The rule, or what else was timed.
        threads: Our thread count.
        verdict: How ours compares with the reference; None where that was not looked at.
        rivals: Stock's modes.
        bytes_moved: What a step has to read and write, where memory bandwidth decides.
        copies: The races with a copy of memory, by its name, where memory bandwidth decides.
        copy_bytes: What that reads and writes.
    """

    shape: str
    what: str
    threads: int
    verdict: Verdict | None = None
    rivals: list[Rival] = field(default_factory=list)
    bytes_moved: int = 0
    copies: dict[str, Race] = field(default_factory=dict)
    copy_bytes: int = 0

    @property
    def races(self) -> list[Race]:
        """The races with the modes that are right."""
        return [rival.race for rival in self.rivals if rival.race]

    @property
    def best(self) -> Rival | None:
        """The stock mode that comes nearest to ours, or passes it, of those that are right."""
        ratios = [(rival.race.ratio.median, rival) for rival in self.rivals if rival.race]
        return min(ratios, key=lambda pair: pair[0])[1] if ratios else None

    @property
    def wrong(self) -> dict[str, int]:
        """The modes that are wrong, and how many elements are."""
        return {r.mode: r.verdict.wrong for r in self.rivals if r.verdict and r.verdict.wrong}

    @property
    def copy_fraction(self) -> float | None:
        """Our bytes a second over those of the fastest copy."""
        if not self.copies:
            return None
        ratio = min(race.ratio.median for race in self.copies.values())
        return ratio * self.bytes_moved / self.copy_bytes


@dataclass(frozen=True)
class Settings:
    """What holds for every row.

    Attributes:
        threads: The default thread count, which ours runs at.
        effort: How long a race is.
        tick: Called after each race, for the progress bar.
    """

    threads: int
    effort: Effort
    tick: Callable[[], object] = lambda: None

    @property
    def counts(self) -> list[int]:
        """The thread counts that stock runs at."""
        return sorted({1, self.threads})

    @property
    def contests(self) -> int:
        """How many races there are with stock in a row."""
        return len(STOCK) * len(self.counts)

    def race(self, ours: Runner, rival: Runner, before: Iterable[Race] = ()) -> Race:
        """One race, broken off early if the rival is far behind the best of those before it."""
        best = min((other.ratio.median for other in before), default=math.inf)
        return race(ours, rival, self.effort, best)
