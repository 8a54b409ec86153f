"""Is the result right? Looked at before any time is taken, on the inputs that are then timed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from fastsgd.bench.contestants import TIMED_LR, Inputs, Mode, Rule, parameters_of

CHECK_STEPS = 3
# So large that a parameter that was not stepped is seen, in bfloat16 too.
CHECK_LR = 0.1


@dataclass(frozen=True)
class Verdict:
    """How a result compares with the reference.

    Attributes:
        wrong: Elements farther from the reference than rounding explains.
        identical: Whether every element is the reference's, to the bit.
    """

    wrong: int
    identical: bool


def reference(inputs: Inputs, rule: Rule) -> list[Tensor]:
    """The parameters after the checked steps of stock's single-tensor path.

    float32 is stepped as it is, so that bits can be compared; a half type in float64.
    """
    dtype = torch.float32 if inputs.shape.dtype == torch.float32 else torch.float64
    return [
        stepped(p.to(dtype, copy=True), g.to(dtype), rule)
        for p, g in zip(inputs.parameters, inputs.gradients, strict=True)
    ]


def stepped(start: Tensor, gradient: Tensor, rule: Rule) -> Tensor:
    """One parameter after the checked steps, alone, so that no other's states take memory."""
    parameter = torch.nn.Parameter(start)
    parameter.grad = gradient
    optimizer = torch.optim.SGD([parameter], lr=CHECK_LR, foreach=False, **rule.options)
    for _ in range(CHECK_STEPS):
        optimizer.step()
    return parameter.detach()


def checked(
    inputs: Inputs, mode: Mode, rule: Rule, truth: Sequence[Tensor], threads: Sequence[int]
) -> tuple[torch.optim.SGD, Verdict]:
    """An optimizer, warm and ready to be timed, and what its first steps came to.

    Args:
        inputs: Where it starts.
        mode: Which optimizer.
        rule: Which update.
        truth: What `reference` made of the same inputs and rule.
        threads: The thread counts that it will be timed at; the checked steps take turns.
    """
    optimizer = inputs.optimizer(mode, rule, CHECK_LR)
    before = torch.get_num_threads()
    for count in islice(cycle(threads), CHECK_STEPS):
        torch.set_num_threads(count)
        optimizer.step()
    torch.set_num_threads(before)
    results = parameters_of(optimizer)
    wrong, identical = 0, True
    for start, true, result in zip(inputs.parameters, truth, results, strict=True):
        if not torch.equal(result.to(true.dtype), true):
            identical = False
            wrong += wrong_elements(start, true, result.detach())
    for group in optimizer.param_groups:
        group["lr"] = TIMED_LR
    return optimizer, Verdict(wrong, identical)


def wrong_elements(start: Tensor, true: Tensor, result: Tensor) -> int:
    """How many elements are not the true ones, give or take rounding.

    Three steps round a handful of times, each by at most half of eps times a value that is no
    larger than the parameter and its whole way:
    |result - true| <= 4 eps (|start| + |true - start|).
    """
    start = start.to(true.dtype)
    bound = 4 * torch.finfo(result.dtype).eps * (start.abs() + (true - start).abs())
    return int(((result.to(true.dtype) - true).abs() <= bound).logical_not().sum())
