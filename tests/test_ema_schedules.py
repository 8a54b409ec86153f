"""Decays that a schedule gives: when it is asked, and what it may do meanwhile."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cases import Row
from onepass import Own, copies
from oracle import all_params, assert_equal
from snapshot import Snapshot
from test_averages import BUILD, run
from torch import Tensor
from torch.nn import Parameter
from twins import parameters, random_grad
from watched import Watched

INVALID = r"Invalid decay value .* provided. Please provide a value in \[0,1\] range."


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_schedule_that_goes_wrong(row: Row, bad: float) -> None:
    """A decay that is none is refused before anything is written."""
    optimizer = row.ours(BUILD(), **row.rich, ema_decay=lambda n: bad if n == 3 else 0.9)
    run(optimizer, None, 2)
    for p in all_params(optimizer):
        p.grad = random_grad(p)
    snapshot = Snapshot(optimizer)
    with pytest.raises(ValueError, match=INVALID):
        optimizer.step()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("strange", [False, True])
def test_schedule_that_meddles(row: Row, strange: bool) -> None:
    """It is asked before the step is planned, which then is of what there is; and asked once."""
    asked: list[int] = []
    what = "nothing"

    def meddles(number: int) -> float:
        nonlocal what
        asked.append(number)
        act, what = what, "nothing"
        if act == "steps":
            optimizer.step()
        elif act == "moves":
            for p in all_params(optimizer):
                p.data = p.data.clone()
        elif act == "frees":
            all_params(optimizer)[1].untyped_storage().resize_(0)
        return 0.5

    params = parameters((33,), (257,), (17, 3))()
    if strange:
        params.append(torch.randn(5, 7).as_subclass(Own).requires_grad_())
    plain = [p.detach().clone().requires_grad_() for p in params]
    optimizer = row.ours(params, **row.rich, ema_decay=meddles)
    stepped = row.ours(plain, **row.rich)
    for act, steps in (("nothing", 1), ("nothing", 1), ("steps", 2), ("moves", 1)):
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad = random_grad(p).as_subclass(torch.Tensor)
        what, was = act, [p.detach() for p in params]
        before = copies(was)
        optimizer.step()
        for _ in range(steps):
            stepped.step()
        assert_equal(copies(params), copies(plain))
        if act == "moves":
            assert_equal(was, before)
    assert asked == [1, 2, 3, 3, 5]
    assert optimizer.state_dict()["param_groups"][0]["ema_steps"] == 5
    what = "frees"
    with pytest.raises(RuntimeError, match="storage"):
        optimizer.step()


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_step_within_a_step_counts(row: Row, warm: bool, has_grad: bool) -> None:
    """The number of averages is read when nothing more can change it."""
    p, watched = Parameter(torch.randn(5)), Watched(torch.randn(2))
    optimizer = row.ours([p, watched], **row.rich, ema_decay=0.5)
    p.grad = random_grad(p)
    if has_grad:
        watched.grad = torch.ones(2)
    seen: list[Tensor] = []

    def steps() -> None:
        optimizer.step()
        seen.append(p.detach().clone())

    for _ in range(2 if warm else 0):
        steps()
    watched.once("on_grad", steps)
    steps()
    expected = seen[0]
    for now in seen[1:]:
        expected = expected.lerp(now, 0.5)
    assert_equal(optimizer.state[p]["ema"], expected)
    assert optimizer.state_dict()["param_groups"][0]["ema_steps"] == (4 if warm else 2)


@pytest.mark.parametrize("how", ["hook", "interrupt"])
def test_an_answer_is_good_for_its_step_alone(row: Row, how: str) -> None:
    """Where a step ends between its two tries, the next asks anew."""
    params = [*parameters((5,))(), torch.randn(3).as_subclass(Own).requires_grad_()]
    optimizer = row.ours(params, **row.rich, ema_decay=0.5)
    for p in params:
        p.grad = torch.ones_like(p).as_subclass(torch.Tensor)
    del params[1].grad  # so that the next step begins in the kernels
    optimizer.step()
    decay = 0.9

    def schedule(number: int) -> float:
        if how == "hook" and decay == 0.9:
            handle = optimizer.register_step_pre_hook(lambda *_: (handle.remove(), stop()))
        return decay

    def stop() -> None:
        raise KeyboardInterrupt

    def tracing(frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_name == "wrapper" and event == "call":
            sys.settrace(None)
            stop()

    optimizer.ema_decay = schedule
    params[1].grad = torch.ones(3)
    before = sys.gettrace()
    if how == "interrupt":
        sys.settrace(tracing)
    try:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    finally:
        sys.settrace(before)
    decay = 0.0
    optimizer.step()
    assert_equal(optimizer.state[params[0]]["ema"], params[0].detach())
