"""What an optimizer holds, and when it lets go."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from cases import Row
from oracle import all_params, assert_equal
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from twins import ORDINARY


def test_lets_go_of_everything(row: Row) -> None:
    """Deleting the optimizer frees it, its states and parameters; no old tensor is held."""
    optimizer = row.ours(ORDINARY(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    grads = [weakref.ref(p.grad) for p in all_params(optimizer)]
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads), "a grad is held after zero_grad"
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in all_params(optimizer):
        p.grad = None
    optimizer.step()

    p = all_params(optimizer)[0]
    storage = StorageWeakRef(p.untyped_storage())
    p.data = torch.randn_like(p)
    assert storage.expired(), "the old memory of a parameter is held"

    state = weakref.ref(optimizer.state[p][row.states[0]])
    del optimizer.state[p]
    assert state() is None, "a deleted state is held"
    states = [weakref.ref(s[row.states[0]]) for s in optimizer.state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert not any(ref() is not None for ref in states), "states are held after loading others"

    removed = weakref.ref(optimizer.param_groups[0]["params"].pop())
    optimizer.state.clear()
    gc.collect()
    assert removed() is None, "a parameter that was removed is held"

    refs = [weakref.ref(optimizer), *(weakref.ref(p) for p in all_params(optimizer))]
    del optimizer, p
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_optimizer_is_freed_without_the_collector(row: Row) -> None:
    """We add no reference cycle to stock's optimizer."""
    gc.collect()
    gc.disable()
    try:
        freed = []
        for cls in (row.ours, row.stock):
            optimizer = cls(ORDINARY(), **row.rich)
            for p in all_params(optimizer):
                p.grad = torch.randn_like(p)
            optimizer.step()
            ref = weakref.ref(optimizer)
            del optimizer, p
            freed.append(ref() is None)
        assert freed[0] or not freed[1]
    finally:
        gc.enable()


def test_parameter_lifetime_reuse(row: Row) -> None:
    """A new parameter at the address of a freed one does not inherit its state."""
    optimizer = row.ours([Parameter(torch.zeros(64))], **row.rich)
    for _ in range(50):
        fresh = Parameter(torch.ones(64))
        fresh.grad = torch.ones(64)
        optimizer.param_groups[0]["params"][:] = [fresh]
        optimizer.state.clear()
        optimizer.step()
        again = Parameter(torch.ones(64))
        again.grad = torch.ones(64)
        stock = row.stock([again], **row.rich, foreach=False)
        stock.step()
        assert_equal(list(optimizer.state.values()), list(stock.state.values()))
        del fresh
