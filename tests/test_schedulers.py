"""Every learning rate scheduler of torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Row
from torch.optim import lr_scheduler
from twins import ORDINARY, Twins, stepped

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.3, anneal_epochs=3),
}


def test_every_scheduler_has_a_row() -> None:
    """A scheduler that torch adds is missed here."""
    assert set(lr_scheduler.__all__) - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row: Row, name: str, tensor_lr: bool) -> None:
    """Every scheduler drives both alike, warns of nothing, and notices a missing step."""
    options = {**row.rich, **({"lr": torch.tensor(0.1)} if tensor_lr else {})}
    try:
        SCHEDULERS[name](row.stock(ORDINARY(), foreach=False, **copy.deepcopy(options)))
    except Exception as refused:  # noqa: BLE001
        pytest.skip(f"stock refuses this scheduler with a tensor lr: {refused}")
    twins = Twins(row, ORDINARY, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [SCHEDULERS[name](optimizer) for optimizer in twins.sides]
        rates = []
        for step in range(6):
            twins.run(1)
            for scheduler in schedulers:
                scheduler.step(*([1.0 + step] if name == "ReduceLROnPlateau" else []))
            rates.append(float(twins.ours.param_groups[0]["lr"]))
    assert len(set(rates)) > 1, "the schedule did nothing"


def test_scheduler_warns_of_a_missing_step(row: Row) -> None:
    """The scheduler sees that the optimizer did not step."""
    optimizer = row.ours(ORDINARY(), **row.rich)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_scheduler_on_a_copy(row: Row) -> None:
    """An optimizer with a scheduler can be copied, and a new scheduler put on the copy."""
    optimizer = stepped(row)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step()
    scheduler.step()
    clone = copy.deepcopy(optimizer)
    again = lr_scheduler.ExponentialLR(clone, 0.9)
    clone.step()
    again.step()
    assert clone.param_groups[0]["lr"] == pytest.approx(optimizer.defaults["lr"] * 0.9 * 0.9)
