"""``skip_nonfinite`` and ``error_if_nonfinite``: steps that change nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import DTYPES, Row, flagged
from onepass import INF, NAN, Extended, copies
from oracle import all_params, assert_equal
from places import emulated
from snapshot import Snapshot
from torch.nn.utils import get_total_norm
from twins import parameters, random_grad

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


@pytest.mark.parametrize("there", [False, True])
def test_a_step_within_a_step(row: Row, there: bool) -> None:
    """A schedule may ask what was found, and step: what that finds is the optimizer's too."""
    seen: list[tuple[int, float | None]] = []

    def schedule(number: int) -> float:
        if len(seen) == number:  # a device asks before it knows that it skips
            return 0.9
        norm = optimizer.grad_norm
        seen.append((optimizer.skipped_steps, None if norm is None else float(norm)))
        if number == 2:
            p = all_params(optimizer)[0]
            grad, p.grad = p.grad, torch.full_like(p, NAN)
            optimizer.step()
            p.grad = grad
        return 0.9

    extras = {"skip_nonfinite": True, "max_grad_norm": 1.0, "ema_decay": schedule}
    optimizer = row.ours(parameters((257,), (8,))(), **row.plain, **extras)
    norms = []
    for count in range(1, 4):
        for p in all_params(optimizer):
            p.grad = random_grad(p)
        norms.append(float(get_total_norm([p.grad for p in all_params(optimizer)])))
        with emulated() if there else nullcontext():
            optimizer.step()
        # Here a step measures before it asks for the decay, a device after that.
        last = NAN if count == 2 and not there else norms[-1]
        assert float(optimizer.grad_norm) == pytest.approx(last, nan_ok=True)
        assert optimizer.skipped_steps == (count > 1)
    known = [None, *norms[:2]] if there else norms
    assert [count for count, _ in seen] == [0, 0, 1]
    assert [norm for _, norm in seen] == pytest.approx(known)


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
