"""The update rules that are timed, and who does each of them: ours, and stock's modes."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

import fastsgd
from fastsgd.bench.shapes import Shape

# Too small to move a parameter far in some thousands of steps, so that no value blows up.
TIMED_LR = 1e-9


@dataclass(frozen=True)
class Mode:
    """One optimizer class, with the arguments that choose its implementation."""

    name: str
    optimizer: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: What the command line calls it.
        title: What the table calls it.
        stock: Torch's class, which says what is right.
        ours: Our optimizer.
        rivals: Stock's modes: its class, with each flag that it has.
        options: The arguments of all of them, but for lr.
        states: How many tensors of state a parameter has, each read and written in a step.
        exact: Whether ours has to have stock's bits in float32. Square roots forbid it: stock's are
            not always the nearest number.
        timed: What is changed in the groups when the time is taken.
    """

    name: str
    title: str
    stock: Callable[..., Optimizer]
    ours: Mode
    rivals: tuple[Mode, ...]
    options: Mapping[str, Any] = field(repr=False)
    states: int
    exact: bool
    timed: Mapping[str, float]

    def bytes_moved(self, shape: Shape) -> int:
        """What a step has to read and write: p, g and p again, and each state twice."""
        return (3 + 2 * self.states) * shape.nbytes

    def bytes_touched(self, shape: Shape) -> int:
        """The memory that a step works on: p, g and the states."""
        return (2 + self.states) * shape.nbytes


def rule(
    name: str,
    title: str,
    ours: type[Optimizer],
    options: Mapping[str, Any],
    states: int,
    exact: bool = False,
    timed: Mapping[str, float] | None = None,
) -> Rule:
    """A rule; stock's class has the name of ours."""
    stock: type[Optimizer] = getattr(torch.optim, ours.__name__)
    lr = {"lr": TIMED_LR}
    return Rule(
        name=name,
        title=title,
        stock=stock,
        ours=Mode("fastsgd", ours),
        rivals=tuple(modes(stock)),
        options=options,
        states=states,
        exact=exact,
        timed=lr | dict(timed or {}),
    )


def modes(stock: type[Optimizer]) -> Iterator[Mode]:
    """Stock's class as it is, and with each flag that it knows; RMSprop has no `fused`."""
    yield Mode("default", stock)
    for flag in ("foreach", "fused"):
        if flag in inspect.signature(stock).parameters:
            yield Mode(flag, stock, {flag: True})


SGD = {"momentum": 0.9, "weight_decay": 5e-4}
RMSPROP = {"centered": True, "momentum": 0.9}

RULES = {
    r.name: r
    for r in (
        rule("sgd", "SGD", fastsgd.SGD, {}, states=0, exact=True),
        rule("momentum", "momentum, wd", fastsgd.SGD, SGD, states=1, exact=True),
        rule(
            "nesterov", "nesterov, wd", fastsgd.SGD, SGD | {"nesterov": True}, states=1, exact=True
        ),
        rule("adamw", "AdamW", fastsgd.AdamW, {"weight_decay": 0.01}, states=2),
        rule("adam", "Adam", fastsgd.Adam, {}, states=2),
        rule(
            "adamw-amsgrad",
            "AdamW, amsgrad",
            fastsgd.AdamW,
            {"weight_decay": 0.01, "amsgrad": True},
            states=3,
        ),
        # With the same gradient at each step v - a^2 goes to 0, and by rounding below. alpha = 1
        # leaves both averages as the checked steps left them, and is as much work.
        rule("rmsprop", "RMSprop centered", fastsgd.RMSprop, RMSPROP, 3, timed={"alpha": 1.0}),
        rule("adagrad", "Adagrad", fastsgd.Adagrad, {}, states=1),
    )
}
