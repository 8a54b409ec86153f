"""What users change between steps: options, groups, parameters, grads, states, dtypes."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, ORDINARY_SHAPES, Row
from oracle import Float64Step, all_params, assert_equal
from torch import Tensor, nn
from torch.nn import Parameter
from twins import ORDINARY, Twins, fresh_states, parameters, stepped


def test_options_edited_at_any_time(row: Row) -> None:
    """Each option of each group, changed by hand, counts from the next step."""

    def build() -> list[dict[str, Any]]:
        return [{"params": ORDINARY()}, {"params": ORDINARY()}]

    twins = Twins(row, build, **(row.rich if row.counts else row.plain)).run(1)
    for edit in row.edits:
        for optimizer in twins.sides:
            flags = {k: v for k, v in edit.items() if k not in ("foreach", "fused")}
            optimizer.param_groups[1].update(edit if optimizer is twins.ours else flags)
        twins.run(2)


def test_numpy_scalars_as_options(row: Row) -> None:
    """Options may be numpy numbers."""
    numpy = pytest.importorskip("numpy")
    twins = Twins(row, ORDINARY, **row.rich)
    for optimizer in twins.sides:
        for key, value in row.rich.items():
            if isinstance(value, float):
                optimizer.param_groups[0][key] = numpy.float64(value * 0.7)
    twins.run(2)


def test_late_and_vanishing_grads(row: Row) -> None:
    """Parameters without a grad are left alone and have no state until they get one."""
    twins = Twins(row, parameters((5,), (70,), (3, 3), ()), **row.rich)
    present = ([0], [0, 2], [], [1, 2, 3], [3], [0, 1, 2, 3], [1])
    for chosen in present:
        twins.grads()
        for optimizer in twins.sides:
            for i, p in enumerate(all_params(optimizer)):
                if i not in chosen:
                    p.grad = None
        untouched = [p.detach().clone() for p in all_params(twins.ours)]
        twins.step()
        twins.check()
        for i, p in enumerate(all_params(twins.ours)):
            assert torch.equal(p.detach(), untouched[i]) == (i not in chosen)


def test_no_grads_at_all(row: Row) -> None:
    """A step without grads does nothing and makes no state."""
    twins = Twins(row, ORDINARY, **row.rich)
    twins.step()
    twins.check()
    assert bool(twins.ours.state) == row.eager


def test_add_param_group(row: Row) -> None:
    """Groups added between steps, with options of their own, defaults filled in."""
    twins = Twins(row, ORDINARY, **row.plain).run(2)
    for options in (row.rich, {}, {"lr": torch.tensor(0.3)}):

        def add(optimizer: Any, options: Any = options) -> None:
            optimizer.add_param_group({"params": ORDINARY(), **copy.deepcopy(options)})

        twins.each(add)
        twins.run(2)
    twins.each(lambda o: o.add_param_group({"params": Parameter(torch.randn(5))}))
    twins.run(1)


def test_data_swapped(row: Row) -> None:
    """``p.data`` may be other memory at every step; the old memory is let go and left alone."""
    twins = Twins(row, parameters((1000,), (33, 17)), **row.rich).run(2)
    for _ in range(3):
        old = [p.data for p in all_params(twins.ours)]
        kept = [t.clone() for t in old]

        def swap(optimizer: Any) -> None:
            for p in all_params(optimizer):
                p.data = torch.randn_like(p)

        twins.each(swap)
        twins.run(1)
        assert_equal(old, kept)


def test_data_swapped_for_another_size(row: Row) -> None:
    """A parameter that grew, with a new state."""
    twins = Twins(row, parameters((1000,), (33,)), **row.rich).run(2)

    def grow(optimizer: Any) -> None:
        p = all_params(optimizer)[0]
        p.data = torch.randn(70, 70)
        p.grad = None
        del optimizer.state[p]

    twins.each(grow)
    twins.run(2)


def test_set_in_place(row: Row) -> None:
    """``p.data.set_``, ``resize_`` and ``copy_`` move memory under the optimizer."""
    twins = Twins(row, parameters((100,), (33,)), **row.rich).run(2)

    def move(optimizer: Any) -> None:
        p, q = all_params(optimizer)
        with torch.no_grad():
            p.set_(torch.randn(130)[7:107])
            q.data.copy_(torch.randn(33))
        p.grad = None

    twins.each(move)
    twins.run(2)


def test_state_edited(row: Row) -> None:
    """States assigned, deleted, emptied, set to None, shared or cleared between steps."""
    twins = Twins(row, parameters((5,), (70,), (3, 3), (9,)), **row.rich).run(2)
    name = row.states[0]

    def assign(o: Any) -> None:
        o.state[all_params(o)[0]][name] = torch.rand(5)

    def delete(o: Any) -> None:
        del o.state[all_params(o)[1]]

    def none(o: Any) -> None:
        o.state[all_params(o)[2]][name] = None

    def empty(o: Any) -> None:
        o.state[all_params(o)[3]] = {}

    def extra(o: Any) -> None:
        for p in all_params(o):
            o.state[p]["mine"] = "text"

    def ordered(o: Any) -> None:
        p = all_params(o)[1]
        o.state[p] = OrderedDict(o.state[p])

    def in_place(o: Any) -> None:
        for p in all_params(o):
            o.state[p][name].mul_(0.5)

    def stranger(o: Any) -> None:
        o.state["note"] = {"any": 1}
        o.state[torch.randn(3)] = {name: torch.randn(3)}

    def clear(o: Any) -> None:
        o.state.clear()

    def replace(o: Any) -> None:
        o.state = type(o.state)(dict, {p: fresh_states(row, p) for p in all_params(o)})

    edits = [assign, delete, extra, ordered, in_place, clear, replace, empty]
    if not row.counts:
        edits.append(none)
    for edit in [*edits, stranger]:
        twins.each(edit)
        twins.grads()
        twins.step()
        if edit is stranger:
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())
        else:
            twins.check()


def test_states_keep_their_tensors(row: Row) -> None:
    """A step writes states in place; their tensors stay the same objects, as in stock."""
    optimizer = stepped(row)
    held = {p: dict(state) for p, state in optimizer.state.items()}
    optimizer.step()
    for p, state in held.items():
        for key, value in state.items():
            assert optimizer.state[p][key] is value


def test_params_list_edited(row: Row) -> None:
    """Append, insert, remove, reorder, replace, with a tuple too."""
    twins = Twins(row, parameters((5,), (70,), (3, 3)), **row.rich).run(2)

    def act(edit: Callable[[dict[str, Any]], Any]) -> None:
        twins.each(lambda o: edit(o.param_groups[0]))
        twins.run(2)

    act(lambda g: g["params"].append(Parameter(torch.randn(17))))
    act(lambda g: g["params"].insert(0, Parameter(torch.randn(2, 2))))
    act(lambda g: g["params"].reverse())
    act(lambda g: g.update(params=tuple(g["params"])))
    act(lambda g: g.update(params=list(g["params"][1:])))
    act(lambda g: g.update(params={"a": g["params"][0], "b": g["params"][1]}.values()))
    act(lambda g: g.update(params=[]))
    act(lambda g: g.update(params=[Parameter(torch.randn(9))]))


def test_groups_edited(row: Row) -> None:
    """``param_groups`` edited and replaced."""

    def build() -> list[dict[str, Any]]:
        return [{"params": ORDINARY(), "lr": 0.1 * (k + 1)} for k in range(3)]

    twins = Twins(row, build, **row.rich).run(1)
    twins.each(lambda o: o.param_groups.reverse())
    twins.run(1)
    twins.each(lambda o: o.param_groups.pop(1))
    twins.run(1)
    twins.each(lambda o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]))
    twins.run(1)
    twins.each(lambda o: o.param_groups.clear())
    for optimizer in twins.sides:
        assert optimizer.step() is None


CASTS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@pytest.mark.parametrize(("first", "then"), CASTS, ids=str)
def test_model_cast_between_steps(row: Row, first: torch.dtype, then: torch.dtype) -> None:
    """After ``model.to(dtype)`` states still have the old dtype: stock's result and dtypes.

    Where a half type takes part, stock rounds more often, so both are held to a float64 step.
    """
    nets: list[nn.Module] = []

    def build() -> list[Tensor]:
        nets.append(nn.Linear(33, 17).to(first))
        return list(nets[-1].parameters())

    twins = Twins(row, build, **row.rich)
    exact = first in EXACT and then in EXACT

    def step() -> bool:
        twins.grads()
        expected = Float64Step(row.stock, twins.ours)
        if not twins.step_if_allowed():
            return False
        for p, q in twins.pairs():
            assert p.dtype == q.dtype
            for key, value in twins.stock.state[q].items():
                assert twins.ours.state[p][key].dtype == value.dtype
        if exact:
            twins.check()
        else:
            loose = 0.1 if torch.bfloat16 in (first, then) else 0.01
            for p, q in expected.twins:
                torch.testing.assert_close(p.double(), q, atol=loose, rtol=loose)
                for key, value in expected.exact.state[q].items():
                    mine = twins.ours.state[p][key].to(value.dtype)
                    torch.testing.assert_close(mine, value, atol=3 * loose, rtol=loose)
        return True

    assert step()
    for net in nets:
        net.to(then)
    if step():
        step()


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_grad_of_another_dtype(row: Row, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A grad whose dtype is not the parameter's: stock promotes or refuses, so do we."""
    for options in (*row.structures, {**row.rich, "maximize": 1}):

        def build() -> list[Tensor]:
            p = Parameter(torch.randn(131, dtype=grad_dtype))
            p.grad = torch.randn(131, dtype=grad_dtype)
            p.data = p.data.to(dtype)
            return [p, Parameter(torch.randn(3))]

        twins = Twins(row, build, **options)
        for _ in range(3):
            if not twins.step_if_allowed():
                break
            twins.check()


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_states_of_another_dtype(
    row: Row, dtype: torch.dtype, grad_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """States of any dtype, as somebody has entered them: stock casts or refuses, so do we."""
    for options, weight_decay in itertools.product(({}, *row.structures), (0, 0.1)):

        def build() -> list[Tensor]:
            p = Parameter(torch.randn(131, dtype=grad_dtype))
            p.grad = torch.randn(131, dtype=grad_dtype)
            p.data = p.data.to(dtype)
            return [Parameter(torch.randn(3)), p]

        def enter_states(optimizer: torch.optim.Optimizer) -> None:
            first, p = all_params(optimizer)
            first.grad = torch.randn(3)
            for q, its in ((first, torch.float32), (p, state_dtype)):
                states = fresh_states(row, q.detach().to(torch.float32))
                optimizer.state[q] = {k: v.to(its) for k, v in states.items() if k != "step"}
                if row.counts:
                    optimizer.state[q] = {"step": states["step"], **optimizer.state[q]}

        twins = Twins(row, build, **{**options, "weight_decay": weight_decay})
        twins.each(enter_states)
        if twins.step_if_allowed():
            twins.check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("dims", [0, 1])
def test_float64_tensor_options(row: Row, dtype: torch.dtype, dims: int) -> None:
    """Options that are float64 tensors, with which stock promotes a parameter of no dimension."""
    for name in ("lr", "weight_decay"):
        for seed in range(20):
            option = torch.full([1] * dims, 0.1, dtype=torch.float64)
            twins = Twins(row, parameters((), (1,), (3,), dtype=dtype), seed=seed, **row.rich)
            for optimizer in twins.sides:
                optimizer.param_groups[0][name] = option
            twins.grads()
            if twins.step_if_allowed(halfway=True):
                twins.check()


def test_default_dtype(row: Row) -> None:
    """Under a float64 default dtype."""
    torch.set_default_dtype(torch.float64)
    Twins(row, parameters(*ORDINARY_SHAPES, dtype=torch.float32), **row.rich).run(3)
    Twins(row, ORDINARY, **{**row.rich, "lr": torch.tensor(0.1)}).run(3)


def test_parameters_of_other_dtypes(row: Row) -> None:
    """Integer parameters do what they do in stock: lr 1 steps, lr 0.1 raises."""
    for lr in (1, 0.1):
        outcomes = []
        for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
            p = torch.zeros(70, dtype=torch.int64)
            p.grad = torch.arange(1, 71)
            try:
                cls([p], lr=lr, **more).step()
                outcomes.append(p.tolist())
            except RuntimeError as refused:
                outcomes.append(str(refused).split("\n")[0])
        assert outcomes[0] == outcomes[1]
