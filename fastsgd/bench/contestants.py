"""Who is timed: our optimizer, stock's three modes, and the inputs that all of them get."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastsgd
from fastsgd.bench.shapes import Shape

# Too small to move a parameter far in some thousands of steps, so that no value blows up.
TIMED_LR = 1e-9


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: What the command line calls it.
        title: What the table calls it.
        options: The optimizer's arguments, but for lr.
    """

    name: str
    title: str
    options: Mapping[str, Any] = field(repr=False)

    def bytes_moved(self, shape: Shape) -> int:
        """What a step has to read and write: p, g and p again; with momentum its buffer twice."""
        return (5 if "momentum" in self.options else 3) * shape.dtype.itemsize * shape.elements

    def bytes_touched(self, shape: Shape) -> int:
        """The memory that a step works on: p and g, and a momentum buffer."""
        return (3 if "momentum" in self.options else 2) * shape.dtype.itemsize * shape.elements


RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", "SGD", {}),
        Rule("momentum", "momentum, wd", {"momentum": 0.9, "weight_decay": 5e-4}),
        Rule("nesterov", "nesterov, wd", {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    )
}


@dataclass(frozen=True)
class Mode:
    """One optimizer class with the flags that choose its implementation."""

    name: str
    optimizer: type[torch.optim.SGD]
    flags: Mapping[str, bool] = field(default_factory=dict, repr=False)


OURS = Mode("fastsgd", fastsgd.SGD)
STOCK = (
    Mode("default", torch.optim.SGD),
    Mode("foreach", torch.optim.SGD, {"foreach": True}),
    Mode("fused", torch.optim.SGD, {"fused": True}),
)


@dataclass(frozen=True)
class Inputs:
    """The values that every contestant starts from, as copies of its own."""

    shape: Shape
    parameters: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def random(cls, shape: Shape) -> "Inputs":
        """Normal values; the same at each call."""
        generator = torch.Generator().manual_seed(2013)

        def values() -> list[Tensor]:
            return [torch.randn(s, generator=generator, dtype=shape.dtype) for s in shape.sizes]

        return cls(shape, values(), values())

    def optimizer(self, mode: Mode, rule: Rule, lr: float = TIMED_LR) -> torch.optim.SGD:
        """An optimizer over copies of the parameters, each with its gradient."""
        copies = [torch.nn.Parameter(p.clone()) for p in self.parameters]
        for copy, gradient in zip(copies, self.gradients, strict=True):
            copy.grad = gradient.clone()
        groups = [{"params": [c]} for c in copies] if self.shape.grouped else [{"params": copies}]
        return mode.optimizer(groups, lr=lr, **rule.options, **mode.flags)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class Training:
    """An optimizer whose gradients a real backward makes, each time in other memory."""

    def __init__(self, inputs: Inputs, mode: Mode, rule: Rule) -> None:
        """Make the optimizer; its parameters have no gradients yet."""
        self.optimizer = inputs.optimizer(mode, rule)
        self.parameters = parameters_of(self.optimizer)
        self.inputs = inputs.gradients

    def backward(self) -> None:
        """Remake every gradient, none of them at the address that it had."""
        kept = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        # d/dp of sum(p * x) is x: gradients as random as the inputs, in a tensor of their own.
        pairs = zip(self.parameters, self.inputs, strict=True)
        torch.autograd.backward(torch.stack([(p * x).sum() for p, x in pairs]).sum())
        del kept
