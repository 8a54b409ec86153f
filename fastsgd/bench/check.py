"""Is the result right? Looked at before any time is taken, on the inputs that are then timed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsgd.bench.contestants import Inputs, parameters_of, set_options
from fastsgd.bench.rules import Mode, Rule

CHECK_STEPS = 3
# So large that a parameter that was not stepped is seen, in bfloat16 too.
CHECK_LR = 0.1
# Elements that are stepped or compared at a time, on one thread. Temporaries, 64 kB in float64, are
# below what malloc asks the kernel for each time anew: page faults would take most of the time, and
# so would waiting for a second thread that does little. On a device launches would.
PIECE = 1 << 13
DEVICE_PIECE = 1 << 24


@dataclass(frozen=True)
class Verdict:
    """How a result compares with the reference.

    Attributes:
        wrong: Elements farther from the reference than rounding explains.
        identical: Whether every element of which that is asked is the reference's, to the bit; None
            where it is asked of none.
    """

    wrong: int
    identical: bool | None


def reference(inputs: Inputs, rule: Rule) -> list[Tensor]:
    """The parameters after the checked steps of stock's single-tensor path.

    They are made in float64, but for those of which ours must have the bits.
    """
    truth = [
        p.to(p.dtype if to_the_bit(p, rule) else torch.float64, copy=True)
        for p in inputs.parameters
    ]
    with threads_set_to(1):
        for tensors in zip(truth, inputs.gradients, strict=True):
            for parameter, gradient in pieces(tensors):
                make_steps(parameter, gradient.to(parameter.dtype), rule)
    return truth


def to_the_bit(parameter: Tensor, rule: Rule) -> bool:
    """Whether ours has to have stock's bits: of exact rules, on the CPU, but for half types."""
    whole = parameter.dtype in (torch.float32, torch.float64)
    return rule.exact and whole and parameter.is_cpu


@contextmanager
def threads_set_to(count: int) -> Iterator[None]:
    """So many threads inside, and as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one size, a piece of each at a time: temporaries are small, and reused."""
    size = PIECE if tensors[0].is_cpu else DEVICE_PIECE
    return zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)


def make_steps(parameter: Tensor, gradient: Tensor, rule: Rule) -> None:
    """The checked steps of one parameter, in place."""
    parameter.grad = gradient
    optimizer = rule.stock([parameter], lr=CHECK_LR, foreach=False, **rule.options)
    for _ in range(CHECK_STEPS):
        optimizer.step()
    parameter.grad = None


def checked(
    inputs: Inputs, mode: Mode, rule: Rule, truth: Sequence[Tensor], threads: Sequence[int]
) -> tuple[Optimizer, Verdict]:
    """An optimizer, warm and ready to be timed, and what its first steps came to.

    Args:
        inputs: Where it starts.
        mode: Which optimizer.
        rule: Which update.
        truth: What `reference` made of the same inputs and rule.
        threads: The thread counts that it will be timed at; the checked steps take turns.
    """
    optimizer = inputs.optimizer(mode, rule, CHECK_LR)
    for count in islice(cycle(threads), CHECK_STEPS):
        with threads_set_to(count):
            optimizer.step()
    results = [p.detach() for p in parameters_of(optimizer)]
    with threads_set_to(1):
        verdict = judged(inputs.parameters, truth, results, rule)
    set_options(optimizer, rule.timed)
    return optimizer, verdict


def judged(
    starts: Sequence[Tensor], truth: Sequence[Tensor], results: Sequence[Tensor], rule: Rule
) -> Verdict:
    """The verdict on all parameters."""
    wrong, identical = 0, []
    for tensors in zip(starts, truth, results, strict=True):
        unequal = [
            wrong_elements(start, true, result)
            for start, true, result in pieces(tensors)
            if not torch.equal(result.to(true.dtype), true)
        ]
        wrong += sum(unequal)
        if to_the_bit(tensors[-1], rule):
            identical.append(not unequal)
    return Verdict(wrong, all(identical) if identical else None)


def wrong_elements(start: Tensor, true: Tensor, result: Tensor) -> int:
    """How many elements are not the true ones, give or take rounding.

    A rounding is off by at most eps / 2 of what is rounded. Three steps round a parameter, which is
    never more than |start| + |way|, some nine times. An update is off by at most 7.5 eps of itself,
    as it is a chain of some fifteen roundings in which nothing cancels: the gradient is the same at
    each step, so what is summed has one sign, and of RMSprop's v a^2 takes no more than 3 % in
    three steps from zero. Together, with way = true - start,
    |result - true| <= eps (5 |start| + 12 |way|). In float64 the true ones are rounded as often;
    what is right uses less than half of the bound, so that two of them are within it.
    """
    start = start.to(true.dtype)
    off, way = (result.to(true.dtype) - true).abs(), (true - start).abs()
    bound = torch.finfo(result.dtype).eps * (5 * start.abs() + 12 * way)
    return int((off <= bound).logical_not().sum())
