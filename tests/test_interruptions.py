"""Python code that runs within `step()` or `zero_grad()`, and pulls away what they stand on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Row
from oracle import all_params
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from twins import Twins
from watched import Watched

N = 20_000


class Once:
    """Does something, once armed, the first time that it is asked to."""

    def __init__(self) -> None:
        """Unarmed."""
        self.action: Callable[[], Any] | None = None
        self.done = False

    def __call__(self) -> None:
        """Do it."""
        action, self.action = self.action, None
        if action is not None:
            action()
            self.done = True


ONCE = Once()


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    ONCE.action, ONCE.done = None, False
    yield
    ONCE.action = None


def bystanders() -> list[Tensor]:
    """Take the memory that was let go of."""
    gc.collect()
    return [torch.full((N,), 5.0) for _ in range(10)]


def drop_grads(o: Optimizer) -> None:
    for p in all_params(o)[1:]:
        p.grad = None


def swap_data(o: Optimizer) -> None:
    for p in all_params(o)[1:]:
        p.data = torch.full((N,), 7.0)


def resize_storages(o: Optimizer) -> None:
    for p in all_params(o)[1:]:
        p.data.untyped_storage().resize_(0)
    o.taken = bystanders()
    for p in all_params(o)[1:]:
        p.data.untyped_storage().resize_(4 * N)
        p.data.fill_(1)


def replace_states(o: Optimizer) -> None:
    for p in all_params(o)[1:]:
        o.state[p] = {name: torch.full_like(v, 0.5) for name, v in o.state[p].items()}


def clear_states(o: Optimizer) -> None:
    o.state.clear()


def change_lr(o: Optimizer) -> None:
    o.param_groups[0]["lr"] = 0.5


ACTIONS = [drop_grads, swap_data, resize_storages, replace_states, clear_states, change_lr]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.parametrize("met_before", [False, True])
def test_asking_for_a_grad(row: Row, action: Callable[[Optimizer], None], met_before: bool) -> None:
    """A parameter of a subclass that has no grad, but does this when it is asked for it.

    It stands first, so that stock too meets it before it reads anything of the others.
    """

    def build() -> list[Parameter]:
        watched = Watched(torch.randn(5))
        watched.on_grad = ONCE
        return [watched, *(Parameter(torch.randn(N)) for _ in range(5))]

    twins = Twins(row, build, **row.rich)
    for o in twins.sides:
        if not met_before:
            o.watched = o.param_groups[0]["params"].pop(0)
    twins.run(2, lambda p: None if p.numel() == 5 else torch.randn_like(p.detach()))
    twins.grads(lambda p: None if p.numel() == 5 else torch.randn_like(p.detach()))
    for o in twins.sides:
        if not met_before:
            o.param_groups[0]["params"].insert(0, o.watched)
        ONCE.action = lambda o=o: action(o)
        ONCE.done = False
        o.step()
        assert ONCE.done, "the grad was not asked for"
        assert all((taken == 5).all() for taken in getattr(o, "taken", []))
    if action is not change_lr:  # which stock reads before it asks
        for p, q in twins.pairs():
            assert torch.equal(p, q)


class Equal:
    """A key that has the hash of a name, and does something when it is compared with it."""

    def __init__(self, name: str) -> None:
        """Pretend to be ``name``."""
        self.name = name

    def __hash__(self) -> int:
        """Return the name's."""
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        """Do it, and be no equal."""
        ONCE()
        return False


@pytest.mark.parametrize("where", ["group", "states"])
def test_comparing_keys(row: Row, where: str) -> None:
    """A key of another type runs no code, and names that were unpickled are found."""
    first, last = Parameter(torch.randn(N)), Parameter(torch.randn(N))
    optimizer = row.ours([{"params": [first]}, {"params": [last]}], **row.rich)
    first.grad, last.grad = torch.ones(N), torch.ones(N)
    optimizer.step()
    dicts = {"group": optimizer.param_groups[1], "states": optimizer.state[last]}
    items = list(dicts[where].items())
    dicts[where].clear()
    for key, value in items:
        dicts[where][Equal(key)] = None
        dicts[where]["".join(key)] = value
    expected = [p.detach().clone() for p in (first, last)]
    ONCE.action = lambda: setattr(first, "grad", None)
    optimizer.step()
    assert not ONCE.done
    for p, before in zip((first, last), expected, strict=True):
        assert (p < before).all()


def test_a_weak_reference_to_a_grad_that_is_dropped(row: Row) -> None:
    """Its callback drops the parameter itself, and takes its memory."""
    for _ in range(4):
        params = [Parameter(torch.randn(1000)) for _ in range(8)]
        optimizer = row.ours(params, **row.plain)
        for p in params:
            p.grad = torch.randn(1000)
        taken: list[Parameter] = []

        def callback(_: object, optimizer: Any = optimizer, taken: Any = taken) -> None:
            optimizer.param_groups[0]["params"].clear()
            taken.extend(Parameter(torch.ones(3)) for _ in range(50))
            for p in taken:
                p.grad = torch.ones(3)

        watched = weakref.ref(params[2].grad, callback)
        del params, p
        optimizer.zero_grad()
        assert watched() is None and len(taken) == 50
        assert all(p.grad is not None for p in taken)


class Ends:
    """Does something when it ends."""

    def __del__(self) -> None:
        """Do it."""
        ONCE()


class Holds(torch.autograd.Function):
    """Twice the input; its graph holds an object."""

    @staticmethod
    def forward(ctx, x, held):
        """Hold it."""
        ctx.held = held
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        """Be no part of this test."""
        return grad * 2, None


@pytest.mark.parametrize("which", ["before", "itself"])
def test_a_graph_that_ends_when_its_grad_is_zeroed(row: Row, which: str) -> None:
    """`zero_grad` detaches a grad; what its graph held drops a grad that was to be zeroed."""
    for _ in range(4):
        params = [Parameter(torch.randn(N)) for _ in range(3)]
        optimizer = row.ours(params, **row.plain)
        params[0].grad, params[2].grad = torch.ones(N), torch.ones(N)
        params[1].grad = Holds.apply(torch.ones(N, requires_grad=True), Ends())
        victim = params[0] if which == "before" else params[1]
        taken: list[Tensor] = []

        def drop(victim: Parameter = victim, taken: list[Tensor] = taken) -> None:
            victim.grad = None
            taken.extend(bystanders())

        ONCE.action = drop
        optimizer.zero_grad(set_to_none=False)
        assert taken and all((t == 5).all() for t in taken)
        assert victim.grad is None
        assert (params[2].grad == 0).all()


def test_parameters_that_are_made_while_they_are_walked(row: Row) -> None:
    """A group's params may be anything that can be walked, and do anything meanwhile."""
    for _ in range(4):
        first, last = Parameter(torch.randn(N)), Parameter(torch.randn(N))
        optimizer = row.ours([{"params": [first]}, {"params": [last]}], **row.plain)
        first.grad, last.grad = torch.ones(N), torch.ones(N)
        taken: list[Tensor] = []

        class Walked:
            def __iter__(self, first: Any = first, last: Any = last, taken: Any = taken) -> Any:
                first.grad = None
                taken.extend(bystanders())
                yield last

        optimizer.param_groups[1]["params"] = Walked()
        optimizer.zero_grad(set_to_none=False)
        assert taken and all((t == 5).all() for t in taken)
        assert (last.grad == 0).all()
