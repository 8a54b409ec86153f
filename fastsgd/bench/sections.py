"""What the main table does not show: fresh gradients, `zero_grad`, groups, too many threads."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from fastsgd.bench.check import reference
from fastsgd.bench.contest import Rival, Row, Settings, races_of
from fastsgd.bench.contestants import Inputs, Training, parameters_of
from fastsgd.bench.measure import Race, Runner
from fastsgd.bench.rules import RULES, Rule
from fastsgd.bench.shapes import SHAPES
from fastsgd.bench.steps import our_optimizer

SHAPE = SHAPES["1000x16"]
GROUPED = SHAPES["465-groups"]
MANY_THREADS = 8

FRESH_RULES = [RULES[name] for name in ("sgd", "momentum", "adamw")]
GROUP_RULES = [RULES[name] for name in ("sgd", "adamw", "rmsprop")]


def fresh_rows(settings: Settings) -> Iterator[Row]:
    """Time `step()` on gradients that a backward has just made, in memory not used before."""
    for rule in FRESH_RULES:
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

    ours = runner(Training(inputs, rule.ours, rule), settings.threads)
    row = Row.of(SHAPE, what, settings.threads)
    for mode in rule.rivals:
        rival = Training(inputs, mode, rule)
        for count in settings.counts:
            race = settings.race(ours, runner(rival, count), races_of(row.rivals))
            row.rivals.append(Rival(mode.name, count, None, race))
            settings.tick()
    return row


def groups(settings: Settings) -> dict[str, Race]:
    """Time a group for each tensor against one group of the same tensors, both ours."""
    apart = Inputs.random(GROUPED)
    together = replace(apart, shape=replace(GROUPED, groups=()))
    races = {}
    for rule in GROUP_RULES:
        truth = reference(apart, rule)
        one, _ = our_optimizer(together, rule, truth, settings)
        many, _ = our_optimizer(apart, rule, truth, settings)
        # The same memory: where it happens to lie tells more than the groups do.
        one.param_groups[0]["params"] = parameters_of(many)
        one.state = many.state
        once, each = (settings.runner(o.step, settings.threads) for o in (one, many))
        races[rule.title] = settings.race(once, each)
        settings.tick()
    return races


def oversubscribed(settings: Settings) -> dict[str, Race]:
    """Time 2000 x 64 with more threads than most machines have cores, against one thread."""
    inputs = Inputs.random(SHAPES["2000x64"])
    rule, races = RULES["sgd"], {}
    for mode in (rule.ours, rule.rivals[-1]):
        step = inputs.optimizer(mode, rule).step
        races[mode.name] = settings.race(Runner(step, 1), Runner(step, MANY_THREADS))
        settings.tick()
    return races
