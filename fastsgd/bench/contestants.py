"""Optimizers ready to step, and the inputs that all of them get."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsgd.bench.rules import TIMED_LR, Mode, Rule
from fastsgd.bench.shapes import Shape


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

    def optimizer(self, mode: Mode, rule: Rule, lr: float = TIMED_LR) -> Optimizer:
        """An optimizer over copies of the parameters, each with its gradient."""
        copies = [torch.nn.Parameter(p.clone()) for p in self.parameters]
        for copy, gradient in zip(copies, self.gradients, strict=True):
            copy.grad = gradient.clone()
        groups = [{"params": [c]} for c in copies] if self.shape.grouped else [{"params": copies}]
        return mode.optimizer(groups, lr=lr, **{**rule.options, **mode.options})


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_options(optimizer: Optimizer, options: Mapping[str, float]) -> None:
    """Change options of all groups, in place where they are tensors."""
    for group in optimizer.param_groups:
        for name, value in options.items():
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value


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
