"""Where a step that is not the CPU's is done: on a device, or by the host in a device's place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Row
from oracle import all_params, assert_equal
from torch import Tensor
from torch.nn import Parameter
from twins import random_grad

import fastsgd
from fastsgd import _C

Build = Callable[[], Sequence[Any]]
Optimizer = torch.optim.Optimizer


class Place:
    """A device: the first one of CUDA."""

    name = "cuda"
    device = torch.device("cuda", 0)

    def do(self, act: Callable[[], Any]) -> Any:
        """Have it done there."""
        return act()

    def step(self, optimizer: Optimizer) -> None:
        """Step in the device's kernels, and nowhere else."""
        assert self.do(lambda: _C.step(optimizer)), "a part went to torch's own path"

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Fill the grads with zeros there."""
        self.do(lambda: optimizer.zero_grad(set_to_none=False))

    def bring(self, params: Sequence[Any]) -> list[Any]:
        """Parameters, or groups of them, with the memory around them and their strides."""
        return [
            {**item, "params": self.bring(item["params"])}
            if isinstance(item, dict)
            else self.param(item)
            for item in params
        ]

    def param(self, p: Tensor) -> Tensor:
        """One parameter."""
        memory = p.untyped_storage().to(device=self.device)
        there = torch.empty(0, dtype=p.dtype, device=self.device)
        there.set_(memory, p.storage_offset(), p.shape, p.stride())
        return Parameter(there)


@contextmanager
def emulated(captures: bool = False) -> Iterator[None]:
    """Let the host do what a device would, to CPU tensors; it may say that it captures a graph."""
    _C.emulate_device(True, captures)
    try:
        yield
    finally:
        _C.emulate_device(False)


class Host(Place):
    """The host, over CPU tensors: it runs the tables and the code that a device would get."""

    name = "host"
    device = torch.device("cpu")

    def do(self, act: Callable[[], Any]) -> Any:
        """Do it as a device would."""
        with emulated():
            return act()

    def param(self, p: Tensor) -> Tensor:
        """Return it: it is there."""
        return p


# Where the host does what a device would, to the last bit of the CPU's kernels.
on_host = pytest.mark.skipif(
    _C.instruction_set() == "baseline",
    reason="devices fuse multiply-adds, which the CPU's kernels do not do here",
)
on_device = pytest.mark.skipif(not fastsgd.cuda_available(), reason="no CUDA device, or no kernels")
PLACES = [
    pytest.param(Host(), id="host", marks=on_host),
    pytest.param(Place(), id="cuda", marks=on_device),
]


def step_here(optimizer: Optimizer) -> None:
    """Step in the CPU's own kernels."""
    assert _C.step(optimizer), "a part went to torch's own path"


def there_and_here(
    place: Place, row: Row, build: Build, **options: Any
) -> tuple[Optimizer, Optimizer]:
    """Return optimizers over equal parameters: those of the place, and the CPU's."""
    sides = []
    for bring in (place.bring, list):
        torch.manual_seed(1)
        sides.append(row.ours(bring(build()), **copy.deepcopy(options)))
    return sides[0], sides[1]


def give(optimizers: Sequence[Optimizer], seed: int, scale: float = 1) -> None:
    """Give all parameters of all optimizers the same random grads."""
    for optimizer in optimizers:
        torch.manual_seed(seed)
        for p in all_params(optimizer):
            p.grad = random_grad(p) * scale


def step_both(place: Place, pair: tuple[Optimizer, Optimizer]) -> None:
    """Step each where it belongs."""
    place.step(pair[0])
    step_here(pair[1])


def assert_alike(there: Optimizer, here: Optimizer) -> None:
    """Parameters, grads and states are equal, bit for bit."""

    def seen(optimizer: Optimizer) -> list[Any]:
        return [
            [
                p.detach().cpu(),
                None if p.grad is None else p.grad.cpu(),
                {
                    name: value.cpu() if isinstance(value, Tensor) else value
                    for name, value in optimizer.state[p].items()
                },
            ]
            for p in all_params(optimizer)
        ]

    for a, b in zip(seen(there), seen(here), strict=True):
        assert_equal(a[0], b[0])
        assert (a[1] is None) == (b[1] is None)
        if a[1] is not None:
            assert_equal(a[1], b[1])
        assert a[2].keys() == b[2].keys()
        assert_equal(a[2], b[2])
