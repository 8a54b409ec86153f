"""Optimizers ready to step, and the inputs that all of them get."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsgd.bench.rules import TIMED_LR, Mode, Rule
from fastsgd.bench.shapes import Shape

CPU = torch.device("cpu")
# No gradient is nearer to 0: a thousandth of its square, as Adam keeps it, is a normal float16.
LEAST_GRADIENT = 0.25


@dataclass(frozen=True)
class Inputs:
    """The values that every contestant starts from, as copies of its own."""

    shape: Shape
    parameters: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def random(cls, shape: Shape, device: torch.device = CPU) -> "Inputs":
        """Normal values, of gradients moved away from 0; the same at each call."""
        generator = torch.Generator().manual_seed(2013)

        def values() -> list[Tensor]:
            pairs = zip(shape.sizes, shape.dtypes, strict=True)
            return [torch.randn(s, generator=generator, dtype=d).to(device) for s, d in pairs]

        parameters, gradients = values(), values()
        for gradient in gradients:
            gradient += torch.full_like(gradient, LEAST_GRADIENT).copysign_(gradient)
        return cls(shape, parameters, gradients)

    def optimizer(self, mode: Mode, rule: Rule, lr: float = TIMED_LR) -> Optimizer:
        """An optimizer over copies of the parameters, each with its gradient."""
        copies = [torch.nn.Parameter(p.clone()) for p in self.parameters]
        for copy, gradient in zip(copies, self.gradients, strict=True):
            copy.grad = gradient.clone()
        remaining, counts = iter(copies), self.shape.groups or (len(copies),)
        groups = [{"params": list(islice(remaining, count))} for count in counts]
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
