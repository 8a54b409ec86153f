"""``ema_weights``: averages in the place of the parameters, for the time of a block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, Row
from onepass import all_dtypes, copies
from oracle import all_params, assert_equal
from snapshot import Snapshot
from test_averages import BUILD, all_of, run
from torch.nn import Parameter
from twins import parameters, random_grad


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_swapped_in_and_out(row: Row, dtype: Any, fails: bool) -> None:
    """In the block the parameters are the averages; after it all is as before, bit for bit."""
    build = all_dtypes((33, 5), (257,), ())
    optimizer = row.ours([*build(), *build()], **row.rich, ema_decay=0.9, ema_dtype=dtype)
    params = all_params(optimizer)
    for steps in (3, 1):
        for _ in range(steps):
            for i, p in enumerate(params):
                p.grad = random_grad(p) if i % 5 else None  # some have no average
            optimizer.step()
        averages = [optimizer.state.get(p, {}).get("ema") for p in params]
        pointers = [t.data_ptr() for t in (*params, *averages) if t is not None]
        before, old, kept = all_of(optimizer), copies(averages), copies(params)
        try:
            with optimizer.ema_weights():
                for p, value, average in zip(params, kept, old, strict=True):
                    assert_equal(p.detach(), value if average is None else average.to(p.dtype))
                    if average is not None and average.dtype == p.dtype:
                        assert_equal(optimizer.state[p]["ema"], value)
                assert any(not torch.equal(p, v) for p, v in zip(params, kept, strict=True))
                if fails:
                    raise Stop
        except Stop:
            assert fails
        assert_equal(all_of(optimizer), before)
        assert pointers == [t.data_ptr() for t in (*params, *averages) if t is not None]


def test_no_weights_to_swap(row: Row) -> None:
    """An error, and nothing changed: without averages, before the first, and inside of itself."""
    for extras in ({}, {"ema_decay": 0.9}):
        optimizer = row.ours(BUILD(), **row.rich, **extras)
        before = all_of(optimizer)
        with pytest.raises(RuntimeError), optimizer.ema_weights():
            raise AssertionError("the block was entered")
        assert_equal(all_of(optimizer), before)
    run(optimizer, None, 3)
    before = all_of(optimizer)
    with optimizer.ema_weights():
        inside = all_of(optimizer)
        with pytest.raises(RuntimeError), optimizer.ema_weights():
            raise AssertionError("the inner block was entered")
        assert_equal(all_of(optimizer), inside)
    assert_equal(all_of(optimizer), before)


ACTS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: o.step(),
    "state_dict": lambda o: o.state_dict(),
    "load_state_dict": lambda o: o.load_state_dict(SAVED[type(o)]),
    "add_param_group": lambda o: o.add_param_group({"params": parameters((5,))()}),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}
SAVED: dict[type, Any] = {}


@pytest.mark.parametrize("act", ACTS)
def test_refused_in_the_block(row: Row, act: str) -> None:
    """What would mistake averages for parameters is refused there, and works again after it."""
    optimizer = row.ours(BUILD(), **row.rich, ema_decay=0.9)
    run(optimizer, None, 3)
    SAVED[type(optimizer)] = copy.deepcopy(optimizer.state_dict())
    before, groups = all_of(optimizer), len(optimizer.param_groups)
    with optimizer.ema_weights():
        snapshot = Snapshot(optimizer)
        with pytest.raises(RuntimeError):
            ACTS[act](optimizer)
        snapshot.assert_unchanged()
    assert_equal(all_of(optimizer), before)
    assert len(optimizer.param_groups) == groups
    ACTS[act](optimizer)
    run(optimizer, None, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_laid_out_otherwise(row: Row, dtype: torch.dtype) -> None:
    """A parameter that came to lie otherwise than its average, in rows too short for themselves."""
    p = Parameter(torch.randn(8, 3, 5, 5).to(dtype))
    optimizer = row.ours([p], **row.rich, ema_decay=0.5)
    for step in range(2):
        p.grad = random_grad(p)
        optimizer.step()
        if not step:
            p.data = p.data.to(memory_format=torch.channels_last)
    was, average = p.detach().clone(), optimizer.state[p]["ema"].clone()
    assert average.stride() != p.stride()
    with optimizer.ema_weights():
        assert_equal(p.detach(), average)
        assert_equal(optimizer.state[p]["ema"], was)
    assert_equal(p.detach(), was)
    assert_equal(optimizer.state[p]["ema"], average)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_that_share_memory(row: Row, dtype: torch.dtype) -> None:
    """Tied whole or in part: what is exchanged last is exchanged back first."""
    memory = torch.randn(24).to(dtype)
    views = [memory, memory.view(24), memory[4:20], memory.view(4, 6)[:, 1:4]]
    apart = parameters((7,), dtype=torch.float64)()
    params = [*map(Parameter, views), *apart]
    optimizer = row.ours(params, **row.rich, ema_decay=0.5, ema_dtype=torch.float32)
    for _ in range(3):
        for p in params:
            p.grad = random_grad(p)
        optimizer.step()
    before = all_of(optimizer)
    for _ in range(2):
        with optimizer.ema_weights():
            pass
        assert_equal(all_of(optimizer), before)


def freed(p: torch.Tensor) -> None:
    p.untyped_storage().resize_(0)


def shrunk(p: torch.Tensor) -> None:
    p.untyped_storage().resize_(p.element_size())


def reshaped(p: torch.Tensor) -> None:
    p.data = torch.ones(2, dtype=p.dtype)


def expanded(p: torch.Tensor) -> None:
    p.data = torch.ones(1, dtype=p.dtype).expand(p.shape)


@pytest.mark.parametrize("spoils", [freed, shrunk, reshaped, expanded])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_other_data_inside(row: Row, dtype: Any, spoils: Callable[[torch.Tensor], None]) -> None:
    """A parameter that was given another shape is not exchanged back; all others are."""
    params = all_dtypes((5,), (3, 7), dtypes=(torch.float32, torch.bfloat16))()
    optimizer = row.ours(params, **row.rich, ema_decay=0.5, ema_dtype=dtype)
    run(optimizer, None, 2)
    before = copies(params)
    for spoilt in range(len(params)):
        own = params[spoilt].data
        with pytest.raises(RuntimeError, match=r"Was (it freed|the parameter's data)|is expanded"):
            with optimizer.ema_weights():
                spoils(params[spoilt])
        params[spoilt].data = torch.zeros(own.shape, dtype=own.dtype)
        after = copies(params)
        assert_equal(
            [p for i, p in enumerate(after) if i != spoilt],
            [p for i, p in enumerate(before) if i != spoilt],
        )
        params[spoilt].data.copy_(before[spoilt])
    run(optimizer, None, 1)


def test_averages_freed_inside(row: Row) -> None:
    """What stands in a parameter's average is lost then; all others get their own values back."""
    params = all_dtypes((5,), (3, 7), dtypes=(torch.float32, torch.bfloat16))()
    optimizer = row.ours(params, **row.rich, ema_decay=0.5)
    run(optimizer, None, 2)
    before = copies(params)
    with pytest.raises(RuntimeError, match="state 'ema' that has a storage of 0 bytes"):
        with optimizer.ema_weights():
            optimizer.state[params[1]]["ema"].untyped_storage().resize_(0)
    assert_equal([*copies(params)[:1], *copies(params)[2:]], [*before[:1], *before[2:]])
    del optimizer.state[params[1]]["ema"]
    run(optimizer, None, 1)


def test_entries_of_others_in_the_state(row: Row) -> None:
    """What is no parameter's states is passed over."""
    optimizer = row.ours(parameters((5,))(), **row.rich, ema_decay=0.5)
    run(optimizer, None, 2)
    optimizer.state["global_step"] = 3
    (p,) = all_params(optimizer)
    average = optimizer.state[p]["ema"].clone()
    with optimizer.ema_weights():
        assert_equal(p.detach(), average)
    assert optimizer.state["global_step"] == 3
