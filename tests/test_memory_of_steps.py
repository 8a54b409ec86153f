"""A step remembers the last one. Whatever happened in between, it must not show."""

from __future__ import annotations

import ctypes
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HUGE, Row
from oracle import all_params
from torch.nn import Parameter
from torch.optim import Optimizer
from twins import Twins, fresh_states, parameters

SHAPES = ((17,), (3, 5), (64,), (5,), (33,))


class Attributes:
    """Its attributes are a state."""


# Edits of a parameter's states, for each parameter in its turn: what a dict can be made to do.
Edit = Callable[[Optimizer, Any, Row], None]


def fresh(row: Row, o: Optimizer, p: Any) -> dict[str, Any]:
    return fresh_states(row, p)


def by_item(o: Optimizer, p: Any, row: Row) -> None:
    for name, value in fresh(row, o, p).items():
        o.state[p][name] = value


def by_update(o: Optimizer, p: Any, row: Row) -> None:
    o.state[p].update(fresh(row, o, p))


def by_or(o: Optimizer, p: Any, row: Row) -> None:
    o.state[p] |= fresh(row, o, p)


def by_pop(o: Optimizer, p: Any, row: Row) -> None:
    new = fresh(row, o, p)
    for name in new:
        o.state[p].pop(name)
    for name, value in new.items():
        o.state[p].setdefault(name, value)


def by_clear(o: Optimizer, p: Any, row: Row) -> None:
    o.state[p].clear()


def by_replacing(o: Optimizer, p: Any, row: Row) -> None:
    o.state[p] = fresh(row, o, p)


def by_replacing_all(o: Optimizer, p: Any, row: Row) -> None:
    o.state = defaultdict(dict, {q: fresh(row, o, q) for q in all_params(o)})


def by_removing(o: Optimizer, p: Any, row: Row) -> None:
    del o.state[p]


def by_removing_all(o: Optimizer, p: Any, row: Row) -> None:
    o.state.clear()


def by_exchanging(o: Optimizer, p: Any, row: Row) -> None:
    """The states of two parameters of one shape change places, dicts and all."""
    q = next(q for q in all_params(o) if q is not p)
    p.data, q.data = q.data, p.data
    p.grad, q.grad = None, None
    o.state[p], o.state[q] = o.state[q], o.state[p]


def by_swapping_tensors(o: Optimizer, p: Any, row: Row) -> None:
    for name in o.state[p]:
        torch.utils.swap_tensors(o.state[p][name], fresh_states(row, p)[name])


def by_data(o: Optimizer, p: Any, row: Row) -> None:
    for name in o.state[p]:
        o.state[p][name].data = fresh_states(row, p)[name]


def by_set(o: Optimizer, p: Any, row: Row) -> None:
    for name in o.state[p]:
        o.state[p][name].set_(fresh_states(row, p)[name])


def by_transposing(o: Optimizer, p: Any, row: Row) -> None:
    for name in row.states:
        state = o.state[p][name]
        if state.dim() == 2:
            o.state[p][name] = state.t().contiguous().t()


def by_attributes(o: Optimizer, p: Any, row: Row) -> None:
    """An object's attributes, which change without the dict, are the states."""
    holder = Attributes()
    for name, value in fresh(row, o, p).items():
        setattr(holder, name, value)
    o.state[p] = vars(holder)
    o.step()
    for name, value in fresh(row, o, p).items():
        setattr(holder, name, value)


def by_another_kind_of_dict(o: Optimizer, p: Any, row: Row) -> None:
    o.state[p] = OrderedDict(fresh(row, o, p))
    o.step()
    for name, value in fresh(row, o, p).items():
        o.state[p].move_to_end(name, last=False)
        o.state[p][name] = value


def by_none(o: Optimizer, p: Any, row: Row) -> None:
    """Where states are not counted in steps, None is none."""
    for name in () if row.counts else row.states:
        o.state[p][name] = None


def by_another_entry(o: Optimizer, p: Any, row: Row) -> None:
    """Neighbours come and go."""
    o.state[torch.randn(2)] = {"note": 1}
    o.state[p]["note"] = "text"


EDITS = [edit for name, edit in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_states_edited(row: Row, edit: Edit) -> None:
    """Each edit of each parameter's states, between warm steps."""
    twins = Twins(row, parameters(*SHAPES), **row.rich)
    twins.run(3)
    for i in range(len(SHAPES)):
        twins.grads()
        twins.each(lambda o, i=i: edit(o, all_params(o)[i], row))
        twins.run(2)


def test_states_come_back_to_another_parameter(row: Row) -> None:
    """What was remembered in one place of the list is not taken for its successor's."""
    twins = Twins(row, parameters((17,), (17,), (17,)), **row.rich)
    twins.run(3)
    for options in (row.plain, row.rich):
        for o in twins.sides:
            o.param_groups[0].update(row.off if options is row.plain else row.rich)
            o.param_groups[0]["params"].reverse()
            o.param_groups[0]["params"].insert(0, o.param_groups[0]["params"].pop())
        twins.run(2)


def test_parameters_without_a_grad_for_a_while(row: Row) -> None:
    """While one has none, its states are replaced, and everybody else goes on."""
    twins = Twins(row, parameters(*SHAPES), **row.rich)
    twins.run(3)
    for i in range(len(SHAPES)):
        twins.grads()
        for o in twins.sides:
            all_params(o)[i].grad = None
        twins.each(lambda o, i=i: by_replacing(o, all_params(o)[i], row))
        twins.step()
        twins.check()
        twins.run(2)


OPTIONS: list[Callable[[dict[str, Any]], Any]] = [
    lambda group: group.update(lr=0.01),
    lambda group: group.__setitem__("lr", 1),
    lambda group: group.__setitem__("lr", torch.tensor(0.02)),
    lambda group: group["lr"].fill_(0.03),
    lambda group: group["lr"].mul_(2),
    lambda group: group.__ior__({"lr": 0.04, "weight_decay": 0.2}),
    lambda group: group.update(maximize=True),
    lambda group: group.update(maximize=0),
    lambda group: (group.pop("lr"), group.setdefault("lr", 0.05)),
    lambda group: group.update(note="text"),
]


def test_options_edited(row: Row) -> None:
    """Options of one group of three, in place and by assignment, between warm steps."""

    def build() -> list[dict[str, Any]]:
        return [{"params": [Parameter(torch.randn(n)) for n in (17, 5)]} for _ in range(3)]

    twins = Twins(row, build, **row.rich)
    twins.run(3)
    for edit in OPTIONS:
        for o in twins.sides:
            edit(o.param_groups[1])
        twins.run(2)


def test_groups_that_change_places(row: Row) -> None:
    def build() -> list[dict[str, Any]]:
        return [
            {"params": [Parameter(torch.randn(17)) for _ in range(2)], "lr": 0.1 * (i + 1)}
            for i in range(4)
        ]

    twins = Twins(row, build, **row.rich)
    twins.run(2)
    for _ in range(4):
        for o in twins.sides:
            o.param_groups.insert(0, o.param_groups.pop())
        twins.run(2)
    for o in twins.sides:
        o.param_groups[0] = dict(o.param_groups[0])
        o.param_groups[1] = OrderedDict(o.param_groups[1], lr=0.3)
    twins.run(2)


def test_grads_that_move_and_grads_that_stay(row: Row) -> None:
    """Gradients are looked up ahead only where they move; both ways, and in between."""
    shapes = tuple((n % 7 + 1, 5) for n in range(50))
    twins = Twins(row, parameters(*shapes), **row.rich)
    for step in range(12):
        if step % 4 < 2:
            twins.grads()
        elif step % 4 == 2:
            twins.grads(lambda p: None if p.numel() == 5 else torch.randn_like(p.detach()))
        else:
            for o in twins.sides:
                for p in all_params(o)[::3]:
                    p.grad = None if p.grad is None else p.grad.clone()
        twins.step()
        twins.check()


class Watched(torch.Tensor):
    """A tensor that counts what is done with it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Count, and do it."""
        Watched.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["state", "grad"])
def test_a_tensor_that_becomes_another_class(row: Row, which: str) -> None:
    """The same object at the same place, but its operators are Python code from now on."""
    twins = Twins(row, parameters(*SHAPES), **row.rich)
    twins.run(3)
    twins.grads()
    for o in twins.sides:
        p = all_params(o)[1]
        (p.grad if which == "grad" else o.state[p][row.states[0]]).__class__ = Watched
    Watched.calls = 0
    twins.ours.step()
    assert Watched.calls > 0, "its data was taken without asking it"
    twins.stock.step()
    for p, q in twins.pairs():
        assert torch.equal(p, q)


def test_new_grad_in_written_memory(row: Row) -> None:
    """A new grad, alone in its storage, whose memory a parameter has lain in for a step."""
    twins = Twins(row, parameters((HUGE,), (HUGE,)), **row.rich)
    homes: dict[torch.optim.Optimizer, torch.Tensor] = {}

    def move(optimizer: torch.optim.Optimizer) -> None:
        homes[optimizer] = torch.randn(HUGE)
        memory = (ctypes.c_float * HUGE).from_address(homes[optimizer].data_ptr())
        all_params(optimizer)[0].data = torch.frombuffer(memory, dtype=torch.float32)

    def meet(optimizer: torch.optim.Optimizer) -> None:
        all_params(optimizer)[1].grad = homes[optimizer]

    for step in range(6):
        twins.grads()
        if step == 2:
            twins.each(move)
        if step == 3:
            twins.each(meet)
        twins.step()
        twins.check()
