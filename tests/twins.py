"""Our optimizer and stock's, side by side over equal parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import ORDINARY_SHAPES, Row
from oracle import all_params, assert_equal, one_thread, strides
from snapshot import Snapshot
from torch import Tensor

# What a group may have on one side only.
FLAGS = {"params", "foreach", "fused", "capturable"}

Build = Callable[[], Sequence[Any]]


class Twins:
    """``ours`` and ``stock`` (its single-tensor path), each over its own build of the parameters.

    ``build`` is called once a side with the same seed, so views and shared memory are real on both.
    """

    def __init__(self, row: Any, build: Build, *, seed: int = 1, **options: Any) -> None:
        """Build both sides. ``foreach`` and ``fused`` among the ``options`` are for ours only."""
        self.row = row
        self.seed = seed
        torch.manual_seed(seed)
        self.ours = row.ours(build(), **copy.deepcopy(options))
        plain = {k: v for k, v in options.items() if k not in ("foreach", "fused")}
        torch.manual_seed(seed)
        self.stock = row.stock(build(), foreach=False, **copy.deepcopy(plain))

    @property
    def sides(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Both optimizers."""
        return self.ours, self.stock

    def each(self, act: Callable[[torch.optim.Optimizer], Any]) -> tuple[Any, Any]:
        """Do the same to both sides from the same random state."""
        torch.manual_seed(self.seed)
        first = act(self.ours)
        torch.manual_seed(self.seed)
        return first, act(self.stock)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of ours with their twins."""
        return zip(all_params(self.ours), all_params(self.stock), strict=True)

    def grads(self, make: Callable[[Tensor], Tensor | None] | None = None) -> None:
        """Give every parameter a new random grad, the same on both sides."""
        self.seed += 1
        make = make or random_grad

        def give(optimizer: torch.optim.Optimizer) -> None:
            for p in all_params(optimizer):
                p.grad = make(p)

        with one_thread():
            self.each(give)

    def step(self) -> None:
        """Step both."""
        self.ours.step()
        with one_thread():
            self.stock.step()

    def step_if_allowed(self, *, halfway: bool = False) -> bool:
        """Step both. Where stock refuses, ours does too, and has written nothing.

        Unless it is stock's own code that refuses ours, ``halfway``.

        Returns:
            Whether both stepped.
        """
        with one_thread():
            try:
                self.stock.step()
            except Exception as error:  # noqa: BLE001
                refused: type[Exception] = type(error)
            else:
                self.ours.step()
                return True
        snapshot = Snapshot(self.ours)
        with pytest.raises(refused):
            self.ours.step()
        if not halfway:
            snapshot.assert_unchanged()
        return False

    def run(self, steps: int = 3, make: Callable[[Tensor], Tensor | None] | None = None) -> Twins:
        """Give grads, step, compare; ``steps`` times."""
        for _ in range(steps):
            self.grads(make)
            self.step()
            self.check()
        return self

    def check(self) -> None:
        """Everything that a user can see is equal: parameters, grads, states, options."""
        with one_thread():
            self._check()

    def _check(self) -> None:
        for p, q in self.pairs():
            assert_equal(p.detach(), q.detach())
            assert p.stride() == q.stride(), (p.stride(), q.stride())
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and not p.grad.is_sparse:
                assert_equal(p.grad, q.grad)
            assert (p in self.ours.state) == (q in self.stock.state), "a state is there on one side"
            if p in self.ours.state:
                check_state(self.ours.state[p], self.stock.state[q])
        assert len(self.ours.state) == len(self.stock.state)
        for group, other in zip(self.ours.param_groups, self.stock.param_groups, strict=True):
            for key in (group.keys() | other.keys()) - FLAGS:
                mine, theirs = group[key], other[key]
                same = torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
                assert same, f"{key}: {mine} is not {theirs}"


def check_state(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two entries of ``optimizer.state`` hold the same keys, values, dtypes and strides."""
    assert list(mine) == list(theirs), (list(mine), list(theirs))
    for key, value in theirs.items():
        if isinstance(value, Tensor) and not value.is_sparse:
            assert_equal(mine[key], value)
            assert strides(mine[key]) == strides(value), (key, mine[key].stride(), value.stride())
            assert not mine[key].requires_grad
        elif value is None:
            assert mine[key] is None


def fresh_states(row: Any, p: Tensor) -> dict[str, Tensor]:
    """Return random states for a parameter, such as steps might have left.

    A centered variance needs an average of squares that is no less than the average's square.
    """
    states = {"step": torch.tensor(3.0)} if row.counts else {}
    for name in row.states:
        states[name] = torch.rand_like(p, requires_grad=False) * 0.25 + 0.25
    return states


def random_grad(p: Tensor) -> Tensor:
    """Return a random grad with no zero in it, laid out as ``p``."""
    grad = torch.randn(p.shape, dtype=torch.float64)
    grad = torch.where(grad.abs() < 1e-3, 0.5, grad).to(p.dtype)
    return torch.empty_like(p, requires_grad=False).copy_(grad)


def parameters(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> Build:
    """Return a build of random parameters of these shapes."""

    def build() -> list[Tensor]:
        return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]

    return build


ORDINARY = parameters(*ORDINARY_SHAPES)


def stepped(row: Row, **options: Any) -> torch.optim.Optimizer:
    """Return our optimizer after one step."""
    optimizer = row.ours(ORDINARY(), **(options or row.rich))
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer
