"""How two ways of doing one thing are timed: in turn, in one process, compared pair by pair."""

import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

# What a timed block lasts at least, far above the clock's resolution and a preemption's shadow.
BLOCK_SECONDS = 2e-3
# No more pairs than this: the median has settled.
MOST_PAIRS = 1000
# A rival that is this many times slower than another is not the best: two pairs are enough.
HOPELESS = 2.0


@dataclass(frozen=True)
class Effort:
    """How long a race is.

    Attributes:
        seconds: A race goes on at least this long,
        pairs: and has at least this many pairs.
    """

    seconds: float
    pairs: int


@dataclass
class Runner:
    """One way of doing the thing timed.

    Attributes:
        call: Does it.
        threads: `torch.get_num_threads()` while it runs.
        prepare: What has to be done anew before each call, and is not timed.
        repeats: How many calls a timed block has; one where there is a `prepare`,
        warm: unless this is set: then they follow each other, as those without do.
        wait: Waits until what was called is done, where that is after it returns.
    """

    call: Callable[[], object]
    threads: int
    prepare: Callable[[], object] | None = None
    repeats: int = 1
    warm: bool = False
    wait: Callable[[], object] = lambda: None

    def warm_up(self) -> None:
        """Run until the time of one call is known, and choose `repeats` by it."""
        self.repeats = 1
        once = self.seconds()
        if (self.prepare is None or self.warm) and once < BLOCK_SECONDS:
            once = min(self.seconds() for _ in range(5))
            self.repeats = max(1, math.ceil(BLOCK_SECONDS / once))

    def seconds(self) -> float:
        """The time of one call: a block's, over its calls."""
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        call, calls = self.call, itertools.repeat(None, self.repeats)
        if self.prepare is not None and self.warm:
            return self.prepared_seconds(self.prepare)
        if self.prepare is not None:
            self.prepare()
        elif self.repeats > 1:
            call()  # what fits a cache is in it, whoever ran before
        self.wait()
        start = perf_counter()
        for _ in calls:
            call()
        self.wait()
        return (perf_counter() - start) / self.repeats

    def prepared_seconds(self, prepare: Callable[[], object]) -> float:
        """The same where each call is prepared, which is not timed."""
        taken = []
        for _ in range(self.repeats + (self.repeats > 1)):
            prepare()
            self.wait()
            start = perf_counter()
            self.call()
            self.wait()
            taken.append(perf_counter() - start)
        return statistics.fmean(taken[-self.repeats :])


@dataclass(frozen=True)
class Spread:
    """The quartiles of a series."""

    first_quartile: float
    median: float
    third_quartile: float

    @classmethod
    def of(cls, series: list[float]) -> "Spread":
        """The quartiles of at least two numbers."""
        return cls(*statistics.quantiles(series, n=4, method="inclusive"))


@dataclass(frozen=True)
class Race:
    """What a race found.

    Attributes:
        ratio: The rival's time over ours, pair by pair.
        ours_us: Our median time of one call in microseconds.
        rival_us: The rival's.
        pairs: How many pairs there were.
    """

    ratio: Spread
    ours_us: float
    rival_us: float
    pairs: int


def race(ours: Runner, rival: Runner, effort: Effort, best: float = math.inf) -> Race:
    """Time both in turn: ours, rival, ours, rival, ...

    Args:
        ours: What the ratio's denominator is.
        rival: What its numerator is.
        effort: How long to go on.
        best: The lowest ratio of another rival; far above it the race is broken off.
    """
    times: list[tuple[float, float]] = []
    with undisturbed():
        ours.warm_up()
        rival.warm_up()
        end = perf_counter() + effort.seconds
        while len(times) < effort.pairs or (perf_counter() < end and len(times) < MOST_PAIRS):
            times.append((ours.seconds(), rival.seconds()))
            if len(times) == 2 and min(b / a for a, b in times) > HOPELESS * best:
                break
    return Race(
        ratio=Spread.of([rival / ours for ours, rival in times]),
        ours_us=1e6 * statistics.median(ours for ours, _ in times),
        rival_us=1e6 * statistics.median(rival for _, rival in times),
        pairs=len(times),
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside, as in `timeit`; the thread count is put back after."""
    threads, collects = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


@contextmanager
def frozen() -> Iterator[None]:
    """Leave what is there already out of garbage collections: one before each race took longest."""
    import torch._dynamo  # noqa: F401 - a lot of objects, which the first optimizer would import

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
