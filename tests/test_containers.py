"""Groups, lists of parameters and states of other types than stock makes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Row
from oracle import all_params, assert_equal
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters

import fastsgd


def test_groups_of_another_type(row: Row) -> None:
    """A group may be any mapping with items of its own making; stock's code reads those."""

    class Doubled(dict):
        def __getitem__(self, key: str) -> Any:
            value = super().__getitem__(key)
            return 2 * value if key == "lr" else value

    twins = Twins(row, parameters((131,), (70,)), **row.plain)
    for optimizer in twins.sides:
        optimizer.param_groups = (Doubled(optimizer.param_groups[0]),)
    for _ in range(2):
        twins.grads()
        for optimizer in twins.sides:
            optimizer.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())
    for optimizer in twins.sides:
        optimizer.zero_grad()
        assert all(p.grad is None for p in all_params(optimizer))


class Cold(dict):
    """States of a parameter that are brought from elsewhere when they are asked for."""

    def __getitem__(self, key: str) -> Any:
        """Return twice what is stored."""
        value = super().__getitem__(key)
        return 2 * value if isinstance(value, Tensor) and value.dim() > 0 else value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the same."""
        return self[key] if key in self else default


class Unfrozen(list):
    """Parameters, without those that are frozen."""

    def __iter__(self) -> Any:
        """Leave out what has another number of elements than 131."""
        return (p for p in super().__iter__() if p.numel() == 131)


class Elsewhere(defaultdict):
    """The states of all parameters, which begin as something else."""

    def __missing__(self, key: Tensor) -> Any:
        """Enter states of its own."""
        self[key] = Cold()
        return self[key]


def cold_states(optimizer: Any) -> None:
    for p in all_params(optimizer):
        optimizer.state[p] = Cold(optimizer.state[p])


def unfrozen_params(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"] = Unfrozen(group["params"])


def unfrozen_groups(optimizer: Any) -> None:
    class OfTheFirst(list):
        def __iter__(self) -> Any:
            return iter([self[0]])

    optimizer.param_groups = OfTheFirst(optimizer.param_groups)


def states_elsewhere(optimizer: Any) -> None:
    optimizer.state = Elsewhere(dict, {})


def another_factory(optimizer: Any) -> None:
    optimizer.state = defaultdict(Cold, {})


CONTAINERS = [cold_states, unfrozen_params, unfrozen_groups, states_elsewhere, another_factory]


@pytest.mark.parametrize("put", CONTAINERS, ids=lambda f: f.__name__)
def test_containers_of_another_type(row: Row, put: Callable[[Any], None]) -> None:
    """What the groups and states are kept in may mean something else by its items."""
    twins = Twins(
        row, lambda: [{"params": parameters((131,), (70,))()} for _ in range(2)], **row.rich
    ).run(2)
    pairs = list(twins.pairs())
    twins.grads()
    for optimizer in twins.sides:
        put(optimizer)
    for _ in range(2):
        for optimizer in twins.sides:
            optimizer.step()
        for p, q in pairs:
            assert_equal(p.detach(), q.detach())
    for optimizer in twins.sides:
        optimizer.zero_grad()
    for p, q in pairs:
        assert (p.grad is None) == (q.grad is None)


def test_groups_that_are_a_property(row: Row) -> None:
    """A class that says itself what its groups are."""

    def doubled(optimizer: Any) -> Any:
        class Own(type(optimizer)):
            param_groups = property(
                lambda self: [{**g, "lr": 2 * g["lr"]} for g in self.__dict__["param_groups"]]
            )

        copied = copy.copy(optimizer)
        copied.__class__ = Own
        return copied

    twins = Twins(row, parameters((131,), (70,)), **row.rich)
    for _ in range(2):
        twins.grads()
        for optimizer in twins.sides:
            doubled(optimizer).step()
        twins.check()


def test_another_class(row: Row) -> None:
    """What an optimizer's class is, and says, is looked at in each step."""
    if row.ours is fastsgd.SGD:
        pytest.skip("which the others become")
    twins = Twins(row, parameters((131,), (70,)), **row.plain).run(1)
    for optimizer, cls in zip(twins.sides, (fastsgd.SGD, torch.optim.SGD), strict=True):
        optimizer.__class__ = cls
        optimizer.defaults = cls(parameters((1,))(), momentum=0.9).defaults
        for group in optimizer.param_groups:
            group.update(optimizer.defaults)
        optimizer.state.clear()
    twins.run(2)

    class Asked(fastsgd.SGD):
        pass

    twins.ours.__class__ = Asked
    twins.run(1)
    groups, asked = twins.ours.param_groups, []
    Asked.param_groups = property(lambda self: asked.append(self) or groups)  # type: ignore[attr-defined]
    twins.run(1)
    assert len(asked) > 1


def test_a_plain_dict_of_states(row: Row) -> None:
    """It makes none by itself: where stock asks for none, there may be none but the average."""
    p = Parameter(torch.ones(3))
    optimizer = row.ours([p], ema_decay=0.5)
    optimizer.state = {p: dict(optimizer.state[p])} if row.plain_states else {}
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state[p]["ema"].shape == p.shape
