"""What the main table does not show: fresh gradients, `zero_grad`, and too many threads."""

from collections.abc import Callable, Iterator
from functools import partial

from fastsgd.bench.contest import Rival, Row, Settings
from fastsgd.bench.contestants import OURS, RULES, STOCK, Inputs, Rule, Training
from fastsgd.bench.measure import Race, Runner
from fastsgd.bench.shapes import SHAPES

SHAPE = SHAPES["1000x16"]
MANY_THREADS = 8


def fresh_rows(settings: Settings) -> Iterator[Row]:
    """Time `step()` on gradients that a backward has just made, in memory not used before."""
    for rule in (RULES["sgd"], RULES["momentum"]):
        yield training_row(rule.title, rule, settings, lambda training: training.optimizer.step)


def zero_grad_rows(settings: Settings) -> Iterator[Row]:
    """Time `zero_grad()` on gradients that a backward has just made."""
    for to_none in (True, False):

        def zero_grad(training: Training, to_none: bool = to_none) -> Callable[[], object]:
            return partial(training.optimizer.zero_grad, set_to_none=to_none)

        yield training_row(f"set_to_none={to_none}", RULES["sgd"], settings, zero_grad)


def training_row(
    what: str,
    rule: Rule,
    settings: Settings,
    timed: Callable[[Training], Callable[[], object]],
) -> Row:
    """Race one call, made once after each backward; the backward is not timed."""
    inputs = Inputs.random(SHAPE)

    def runner(training: Training, threads: int) -> Runner:
        return Runner(timed(training), threads, prepare=training.backward)

    ours = runner(Training(inputs, OURS, rule), settings.threads)
    row = Row(SHAPE.name, what, settings.threads)
    for mode in STOCK:
        rival = Training(inputs, mode, rule)
        for count in settings.counts:
            race = settings.race(ours, runner(rival, count), row.races)
            row.rivals.append(Rival(mode.name, count, None, race))
            settings.tick()
    return row


def oversubscribed(settings: Settings) -> dict[str, Race]:
    """Time 2000 x 64 with more threads than most machines have cores, against one thread."""
    inputs = Inputs.random(SHAPES["2000x64"])
    races = {}
    for mode in (OURS, STOCK[-1]):
        step = inputs.optimizer(mode, RULES["sgd"]).step
        races[mode.name] = settings.race(Runner(step, 1), Runner(step, MANY_THREADS))
        settings.tick()
    return races
