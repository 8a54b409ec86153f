"""Checkpoints go both ways between stock and ours; copies and pickles go on."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import EXACT, ORDINARY_SHAPES, Row, flagged
from oracle import all_params, assert_equal
from torch import Tensor, nn
from twins import ORDINARY, Twins, parameters, stepped


def exchange(twins: Twins) -> None:
    """Give ours stock's checkpoint and stock ours."""
    mine, theirs = (copy.deepcopy(o.state_dict()) for o in twins.sides)
    for group in mine["param_groups"]:
        group.update(foreach=False, fused=None)
    twins.ours.load_state_dict(theirs)
    twins.stock.load_state_dict(mine)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("rich", [False, True])
def test_checkpoints_go_both_ways_at_any_step(row: Row, rich: bool, dtype: torch.dtype) -> None:
    """Exchange after 0, 1, 2, ... steps; both go on with equal bits."""
    build = parameters(*ORDINARY_SHAPES, dtype=dtype)
    twins = Twins(row, build, **(row.rich if rich else row.plain))
    for _ in range(5):
        exchange(twins)
        twins.run(1)


def test_state_dicts_are_equal(row: Row) -> None:
    """The same keys in the same order, the same values."""
    twins = Twins(row, ORDINARY, **row.rich, **row.fused).run(2)
    mine, theirs = (o.state_dict() for o in twins.sides)
    assert list(mine) == list(theirs) == ["state", "param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in mine["state"].items():
        assert list(state) == list(theirs["state"][key])
        assert all(type(v) is Tensor for v in state.values())
    for group, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert list(group) == list(other)
        assert group["params"] == other["params"]


MODES: tuple[dict[str, Any], ...] = (
    {"fused": True},
    {"foreach": True},
    {"foreach": False},
    {"capturable": True},
    {"capturable": True, "foreach": True},
)


@pytest.mark.parametrize(**flagged(*MODES))
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_loads_checkpoints_of_every_mode(row: Row, flags: Any, dtype: torch.dtype) -> None:
    """A checkpoint that carries stock's flags steps right here (stock would turn fused)."""
    defaults = row.stock(ORDINARY()).defaults
    off = {k: defaults[k] for k in ("foreach", "fused", "capturable") if k in defaults}
    build = parameters(*ORDINARY_SHAPES, dtype=dtype)
    twins = Twins(row, build, **row.rich).run(1)
    saved = copy.deepcopy(twins.stock.state_dict())
    for group in saved["param_groups"]:
        group.update({**off, **flags})
    for fresh in (False, True):
        if fresh:
            params = all_params(twins.ours)
            twins.ours = row.ours(params, **row.plain)
        twins.ours.load_state_dict(copy.deepcopy(saved))
        twins.stock.load_state_dict(copy.deepcopy(twins.stock.state_dict()))
        for group in twins.ours.param_groups:
            assert {k: group[k] for k in flags} == flags
            group.update(off if fresh else {})
        twins.run(2)
        saved = copy.deepcopy(twins.stock.state_dict())
        for group in saved["param_groups"]:
            group.update({**off, **flags})


def test_loads_an_old_checkpoint(row: Row) -> None:
    """Groups without the newer keys, states that are None or empty, steps that are numbers."""
    twins = Twins(row, ORDINARY, **row.rich).run(2)
    saved = copy.deepcopy(twins.stock.state_dict())
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "differentiable", "fused", "capturable"):
            group.pop(key, None)
        group.pop("decoupled_weight_decay", None)
    if row.counts:
        for state in saved["state"].values():
            state["step"] = int(state["step"])
    else:
        saved["state"][0] = dict.fromkeys(row.states)
        saved["state"][1] = {}
    for optimizer in twins.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.run(3)


def test_loads_a_state_of_another_dtype(row: Row) -> None:
    """The loader casts states to the parameter's dtype, as stock's does."""
    twins = Twins(row, parameters(*ORDINARY_SHAPES, dtype=torch.float64), **row.rich).run(2)
    saved = copy.deepcopy(twins.stock.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = value.half()
    for optimizer in twins.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.run(2)


def test_refuses_checkpoints_that_do_not_fit(row: Row) -> None:
    """Stock's errors."""
    optimizer = stepped(row)
    other = row.stock(ORDINARY()[:-1], **row.rich).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other)
    other["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other)


def test_state_dict_hooks(row: Row) -> None:
    """Hooks of saving and loading run."""
    optimizer = stepped(row)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "load pre", "load post"]


def test_named_parameters(row: Row) -> None:
    """``param_names`` goes through checkpoints."""
    twins = Twins(row, lambda: list(nn.Linear(7, 9).named_parameters()), **row.rich).run(2)
    assert twins.ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    exchange(twins)
    twins.run(2)


def test_torch_save_and_load(row: Row) -> None:
    """A checkpoint survives ``torch.save`` and ``torch.load(weights_only=True)``."""
    twins = Twins(row, ORDINARY, **row.rich).run(2)
    for optimizer in twins.sides:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        optimizer.load_state_dict(loaded)
    twins.run(2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on(row: Row, how: str, steps: int) -> None:
    """A copy with its parameters is independent and steps with the same bits."""
    twins = Twins(row, ORDINARY, **row.rich).run(steps)
    before = copy.deepcopy([p.detach() for p in all_params(twins.ours)])
    if how == "deepcopy":
        clone = copy.deepcopy(twins.ours)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(twins.ours))
    else:
        file = io.BytesIO()
        torch.save(twins.ours, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    assert type(clone) is type(twins.ours)
    assert clone.defaults == twins.ours.defaults
    original, twins.ours = twins.ours, clone
    twins.run(3)
    assert_equal([p.detach() for p in all_params(original)], before)
    assert not set(map(id, clone.state)) & set(map(id, original.state))


def test_model_and_optimizer_copied_together(row: Row) -> None:
    """A deepcopy of both keeps them tied."""
    net = nn.Linear(9, 9)
    optimizer = row.ours(net.parameters(), **row.rich)
    net(torch.ones(9)).sum().backward()
    optimizer.step()
    other, other_optimizer = copy.deepcopy((net, optimizer))
    assert all_params(other_optimizer)[0] is other.weight
    before = other.weight.detach().clone()
    other(torch.ones(9)).sum().backward()
    other_optimizer.step()
    assert not torch.equal(other.weight, before)


def test_getstate_is_stocks(row: Row) -> None:
    """Nothing of ours is pickled."""
    assert stepped(row).__getstate__().keys() == {"defaults", "state", "param_groups"}


def test_distributed_checkpoint_helpers(row: Row) -> None:
    """The helpers that make states by a step with lr 0 and zero grads."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = nn.Linear(7, 9)
    start = copy.deepcopy(net.state_dict())
    optimizer = row.ours(net.parameters(), **row.rich)
    empty = get_optimizer_state_dict(net, optimizer)
    assert_equal(net.state_dict(), start)
    assert all(p.grad is None for p in net.parameters())
    net(torch.ones(7)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    set_optimizer_state_dict(net, optimizer, empty)
    set_optimizer_state_dict(net, optimizer, saved)
    for name in row.states:
        assert_equal(optimizer.state[net.weight][name], saved["state"]["weight"][name])
