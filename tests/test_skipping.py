"""``skip_nonfinite`` and ``error_if_nonfinite``: steps that change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, Row, flagged
from onepass import INF, NAN, Extended, Own, copies
from oracle import all_params, assert_equal
from snapshot import Snapshot
from twins import parameters, random_grad

import fastsgd

# A NaN or infinity where the loops over registers, and the tails after them, may miss it.
PLACES = [(0, 0), (0, 256), (1, 7), (2, 0), (3, 1024)]


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_raises_or_skips(
    row: Row, skip: bool, dtype: torch.dtype, value: float, limit: Any, norm_type: float
) -> None:
    """A step that meets one changes nothing: it raises torch's error, or is counted."""
    what = {"skip_nonfinite": True} if skip else {"error_if_nonfinite": True}
    extras = {**what, "max_grad_norm": limit, "norm_type": norm_type}
    twins = Extended(row, parameters((257,), (8,), (), (1025,), dtype=dtype), extras, **row.rich)
    ours = twins.ours
    assert ours.skipped_steps == 0
    for count, (which, at) in enumerate(PLACES, 1):
        twins.grads()
        all_params(ours)[which].grad.view(-1)[at] = value
        snapshot = Snapshot(ours)
        if skip:
            ours.step()
            assert ours.skipped_steps == count and not ours.grad_norm.isfinite()
        else:
            with pytest.raises(RuntimeError, match=f"total norm of order {norm_type} .*non-finite"):
                ours.step()
        snapshot.assert_unchanged()
        if count > 1:
            twins.run(1)
    assert ours.skipped_steps == (len(PLACES) if skip else 0)


def test_finite_grads_of_an_infinite_norm(row: Row) -> None:
    """Where single precision has no number for the norm: an error, but nothing to skip."""
    for what in ("skip_nonfinite", "error_if_nonfinite"):
        twins = Extended(row, parameters((70,)), {what: True, "max_grad_norm": 1.0}, **row.plain)
        twins.grads(lambda p: torch.full_like(p, 3e38))
        if what == "skip_nonfinite":
            twins.step()
            twins.check()
        else:
            with pytest.raises(RuntimeError, match="non-finite"):
                twins.ours.step()


@pytest.mark.parametrize("bad", [None, INF, NAN])
def test_finite_grads_of_an_infinite_norm_in_torch(row: Row, bad: float | None) -> None:
    """Where torch's code takes part, too, it is elements that count and not their squares."""
    values = parameters((3,), dtype=torch.float64)()[0].detach()
    p = values.clone().as_subclass(Own).requires_grad_()
    optimizer = row.ours([p], **row.plain, skip_nonfinite=True)
    p.grad = torch.full_like(p, 1e200)
    if bad is not None:
        p.grad[1] = bad
    optimizer.step()
    assert optimizer.skipped_steps == (bad is not None)
    if bad is not None:
        assert_equal(p.detach().as_subclass(torch.Tensor), values)


@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_finite_grads_of_an_infinite_norm_that_are_complex(norm_type: float) -> None:
    """Where a magnitude is beyond its dtype, and neither of the two numbers is."""
    for dtype, size in ((torch.complex64, 3e38), (torch.complex128, 1.6e308)):
        p = torch.zeros(3, dtype=dtype).requires_grad_()
        p.grad = torch.full_like(p, complex(size, size)).detach()
        optimizer = fastsgd.SGD([p], lr=1e-3, skip_nonfinite=True, norm_type=norm_type)
        optimizer.step()
        assert optimizer.skipped_steps == 0 and bool(p.detach().all())
        p.grad[1] = complex(0, NAN)
        optimizer.step()
        assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(**flagged({}, {"fused": True}))
def test_overflow_under_a_scaler(row: Row, flags: Any, unscale: bool) -> None:
    """What the scaler skips changes nothing and is not counted: it keeps a count of its own."""
    extras = {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}
    optimizer = row.ours(parameters((257,), (8,))(), **row.rich, **flags, **extras)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    for overflow in (False, True, True, False):
        for p in all_params(optimizer):
            p.grad = random_grad(p) * scaler.get_scale()
        if overflow:
            all_params(optimizer)[1].grad[3] = INF
        before = copies(all_params(optimizer))
        states = [copies(optimizer.state[p].values()) for p in all_params(optimizer)]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.skipped_steps == 0
        if overflow:
            assert_equal([p.detach() for p in all_params(optimizer)], before)
            now = [list(optimizer.state[p].values()) for p in all_params(optimizer)]
            assert_equal(now, states)
        else:
            assert not torch.equal(all_params(optimizer)[0].detach(), before[0])
    assert scaler.get_scale() == 16.0
