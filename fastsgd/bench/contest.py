"""A row of the results: ours, and the rivals that it was raced with."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fastsgd.bench.check import Verdict
from fastsgd.bench.measure import Effort, Race, Runner, race


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
        what: The rule, or what else was timed.
        threads: Our thread count.
        verdict: How ours compares with the reference; None where that was not looked at.
        rivals: Stock's modes.
        opponents: Other libraries' optimizers.
        failures: The opponents that raised, and what.
        bytes_moved: What a step has to read and write, where memory bandwidth decides.
        copies: The races with a copy of memory, by its name, where memory bandwidth decides.
        copy_bytes: What that reads and writes.
    """

    shape: str
    what: str
    threads: int
    verdict: Verdict | None = None
    rivals: list[Rival] = field(default_factory=list)
    opponents: list[Rival] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    copies: dict[str, Race] = field(default_factory=dict)
    copy_bytes: int = 0

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
        if not self.copies:
            return None
        ratio = min(race.ratio.median for race in self.copies.values())
        return ratio * self.bytes_moved / self.copy_bytes


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
    """

    threads: int
    effort: Effort
    tick: Callable[[], object] = lambda: None

    @property
    def counts(self) -> list[int]:
        """The thread counts that stock runs at."""
        return sorted({1, self.threads})

    def race(self, ours: Runner, rival: Runner, before: Iterable[Race] = ()) -> Race:
        """One race, broken off early if the rival is far behind the best of those before it."""
        best = min((other.ratio.median for other in before), default=math.inf)
        return race(ours, rival, self.effort, best)
