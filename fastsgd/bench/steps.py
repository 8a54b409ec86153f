"""The main table: `step()` on gradients that stay where they are."""

from collections.abc import Iterable

from torch import Tensor

from fastsgd.bench.bandwidth import copies
from fastsgd.bench.check import Verdict, checked, reference
from fastsgd.bench.contest import Rival, Row, Settings, races_of
from fastsgd.bench.contestants import Inputs
from fastsgd.bench.measure import Runner
from fastsgd.bench.opponents import Opponent
from fastsgd.bench.rules import Mode, Rule


class WrongResultError(Exception):
    """Our own result is wrong, and so its time means nothing."""


def step_row(
    inputs: Inputs, rule: Rule, settings: Settings, opponents: Iterable[Opponent] = ()
) -> Row:
    """Check ours, then race it with stock's modes and opponents that are right, and with a copy."""
    shape = inputs.shape
    truth = reference(inputs, rule)
    ours, verdict = our_runner(inputs, rule, truth, settings)
    row = Row(shape.name, rule.title, settings.threads, verdict)
    for mode in rule.rivals:
        enter(row.rivals, inputs, mode, rule, truth, ours, settings)
    for opponent in opponents:
        if opponent.enters(rule, shape.dtype):
            enter_opponent(row, inputs, opponent, rule, truth, ours, settings)
    del truth
    if shape.large:
        row.bytes_moved = rule.bytes_moved(shape)
        row.copy_bytes = rule.bytes_touched(shape)
        for name, copy in copies(row.copy_bytes, settings.counts):
            row.copies[name] = settings.race(ours, copy, row.copies.values())
    return row


def our_runner(
    inputs: Inputs, rule: Rule, truth: list[Tensor], settings: Settings
) -> tuple[Runner, Verdict]:
    """Our step, after a look at its results.

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
    return Runner(optimizer.step, settings.threads), verdict


def enter(
    rivals: list[Rival],
    inputs: Inputs,
    mode: Mode,
    rule: Rule,
    truth: list[Tensor],
    ours: Runner,
    settings: Settings,
) -> None:
    """Enter one rival at each thread count; it is in memory only for as long."""
    optimizer, verdict = checked(inputs, mode, rule, truth, settings.counts)
    for count in settings.counts:
        race = None
        if not verdict.wrong:
            race = settings.race(ours, Runner(optimizer.step, count), races_of(rivals))
        rivals.append(Rival(mode.name, count, verdict, race))
        settings.tick()


def enter_opponent(
    row: Row,
    inputs: Inputs,
    opponent: Opponent,
    rule: Rule,
    truth: list[Tensor],
    ours: Runner,
    settings: Settings,
) -> None:
    """Enter an opponent; if it fails, whatever the reason, the row says so."""
    rivals: list[Rival] = []
    try:
        enter(rivals, inputs, opponent.mode(rule), rule, truth, ours, settings)
    except Exception as error:
        row.failures[opponent.name] = type(error).__name__
    row.opponents += rivals
