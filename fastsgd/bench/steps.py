"""The main table: `step()` on gradients that stay where they are."""

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from fastsgd.bench.bandwidth import race_copies, race_passes
from fastsgd.bench.check import Verdict, checked, reference
from fastsgd.bench.contest import Rival, Row, Settings, races_of
from fastsgd.bench.contestants import Inputs
from fastsgd.bench.errors import WrongResultError
from fastsgd.bench.measure import Runner
from fastsgd.bench.opponents import Opponent
from fastsgd.bench.rules import Mode, Rule


def step_row(
    inputs: Inputs,
    rule: Rule,
    settings: Settings,
    opponents: Iterable[Opponent] = (),
    floor: bool = False,
) -> Row:
    """Check ours, then race it with all who are right, and with memory.

    Args:
        inputs: Where all of them start.
        rule: Which update.
        settings: What holds for every row.
        opponents: Who enters beside stock's modes.
        floor: Race with copies of small shapes too, and with passes in place.
    """
    shape = inputs.shape
    truth = reference(inputs, rule)
    ours, verdict = our_runner(inputs, rule, truth, settings)
    row = Row.of(shape, rule.title, settings.threads, verdict)
    for mode in rule.rivals:
        row.rivals += entered(row, mode, inputs, rule, truth, ours, settings, row.rivals)
    for opponent in opponents:
        if opponent.enters(rule, shape):
            mode = opponent.mode(rule)
            row.opponents += entered(row, mode, inputs, rule, truth, ours, settings)
    del truth
    if shape.large or floor:
        row.bytes_moved = rule.bytes_moved(shape)
        row.copy_bytes = rule.bytes_touched(shape)
        race_copies(row, ours, settings)
    if floor:
        race_passes(row, ours, settings)
    return row


def our_optimizer(
    inputs: Inputs, rule: Rule, truth: list[Tensor], settings: Settings
) -> tuple[Optimizer, Verdict]:
    """Ours, ready to be timed, after a look at its results.

    Raises:
        WrongResultError: If they are wrong, or have not the bits that they should have.
    """
    optimizer, verdict = checked(inputs, rule.ours, rule, truth, [settings.threads])
    if verdict.wrong or verdict.identical is False:
        bits = "" if verdict.identical is None else " or not bit-identical"
        raise WrongResultError(
            f"{inputs.shape.name}, {rule.title}: fastsgd has {verdict.wrong} of "
            f"{inputs.shape.elements} elements wrong{bits}; nothing was timed."
        )
    return optimizer, verdict


def our_runner(
    inputs: Inputs, rule: Rule, truth: list[Tensor], settings: Settings
) -> tuple[Runner, Verdict]:
    """The step of ours, likewise."""
    optimizer, verdict = our_optimizer(inputs, rule, truth, settings)
    return settings.runner(optimizer.step, settings.threads), verdict


def entered(
    row: Row,
    mode: Mode,
    inputs: Inputs,
    rule: Rule,
    truth: list[Tensor],
    ours: Runner,
    settings: Settings,
    before: Sequence[Rival] = (),
) -> list[Rival]:
    """One rival at each thread count; it is in memory only for as long.

    If it fails, whatever the reason, the row says so. It is let go early if it is far behind the
    best of those before it.
    """
    rivals: list[Rival] = []
    try:
        optimizer, verdict = checked(inputs, mode, rule, truth, settings.counts)
        for count in settings.counts:
            race = None
            if not verdict.wrong:
                runner = settings.runner(optimizer.step, count)
                race = settings.race(ours, runner, races_of([*before, *rivals]))
            rivals.append(Rival(mode.name, count, verdict, race))
            settings.tick()
    except Exception as error:
        row.failures[mode.name] = type(error).__name__
    return rivals
