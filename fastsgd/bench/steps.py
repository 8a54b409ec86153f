"""The main table: `step()` on gradients that stay where they are."""

import torch
from torch import Tensor

from fastsgd.bench.bandwidth import copies
from fastsgd.bench.check import checked, reference
from fastsgd.bench.contest import Rival, Row, Settings
from fastsgd.bench.contestants import OURS, STOCK, Inputs, Mode, Rule
from fastsgd.bench.measure import Runner


class WrongResultError(Exception):
    """Our own result is wrong, and so its time means nothing."""


def step_row(inputs: Inputs, rule: Rule, settings: Settings) -> Row:
    """Check ours, then race it with each of stock's modes that is right, and with a copy."""
    shape = inputs.shape
    truth = reference(inputs, rule)
    optimizer, verdict = checked(inputs, OURS, rule, truth, [settings.threads])
    if verdict.wrong or (shape.dtype == torch.float32 and not verdict.identical):
        bits = "" if verdict.identical else "not "
        raise WrongResultError(
            f"{shape.name}, {rule.title}: fastsgd.SGD has {verdict.wrong} of {shape.elements} "
            f"elements wrong and is {bits}bit-identical to the reference; nothing was timed."
        )
    ours = Runner(optimizer.step, settings.threads)
    row = Row(shape.name, rule.title, settings.threads, verdict)
    for mode in STOCK:
        enter(row, inputs, mode, rule, truth, ours, settings)
    del truth
    if shape.large:
        row.bytes_moved = rule.bytes_moved(shape)
        row.copy_bytes = rule.bytes_touched(shape)
        for name, copy in copies(row.copy_bytes, settings.counts):
            row.copies[name] = settings.race(ours, copy, row.copies.values())
    return row


def enter(
    row: Row,
    inputs: Inputs,
    mode: Mode,
    rule: Rule,
    truth: list[Tensor],
    ours: Runner,
    settings: Settings,
) -> None:
    """Enter one of stock's modes at each thread count; it is in memory only for as long."""
    optimizer, verdict = checked(inputs, mode, rule, truth, settings.counts)
    for count in settings.counts:
        race = None
        if not verdict.wrong:
            race = settings.race(ours, Runner(optimizer.step, count), row.races)
        row.rivals.append(Rival(mode.name, count, verdict, race))
        settings.tick()
