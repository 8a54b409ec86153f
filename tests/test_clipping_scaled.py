"""``torch.amp.GradScaler`` around a step that clips, skips or averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, HALVES, TAKE_FUSED, Row, flagged, label
from onepass import INF, ClippedStep, assert_norm, coefficient, copies, with_extras
from oracle import all_params, assert_equal
from test_clipping import CLIPS, SHAPES
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

import fastsgd


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("extras", CLIPS[:8], ids=label)
@pytest.mark.parametrize(**flagged({}, {"fused": True}))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled(row: Row, flags: Any, dtype: torch.dtype, extras: Any, unscale: bool) -> None:
    """Grads are divided once, then clipped; a fused step leaves them scaled."""
    if dtype == torch.float16 and (unscale or not flags):
        pytest.skip("stock refuses to unscale float16 grads outside of a fused step")
    inside = bool(flags) and not unscale
    scale = 1000.0 if inside and dtype in EXACT else 1024.0
    twins = Twins(with_extras(row, **extras), parameters(*SHAPES, dtype=dtype), **row.rich, **flags)
    ours, stock = twins.sides
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for _ in range(3):
        twins.grads(lambda p: random_grad(p) * scale)
        before = copies(p.grad for p in all_params(ours))
        right = [(grad / torch.tensor(scale)).to(dtype) for grad in before]
        expected = ClippedStep(row, ours, scale) if dtype in HALVES else None
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        assert_equal([p.grad for p in all_params(ours)], before if inside else right)
        if "max_grad_norm" in extras:
            assert_norm(ours.grad_norm, right, ours.norm_type)
        if expected:
            expected.check()
            continue
        for q, grad in zip(all_params(stock), right, strict=True):
            if ours.max_grad_norm is not None:
                grad = grad * coefficient(ours.grad_norm, ours.max_grad_norm)
            value = ours.clip_grad_value
            q.grad = grad if value is None else grad.clamp(-value, value)
        stock.step()
        assert_equal(
            [p.detach() for p in all_params(ours)], [q.detach() for q in all_params(stock)]
        )


@pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)
def test_scaler_without_extras(row: Row) -> None:
    """With none of them a fused step unscales the grads in place, as it always did."""
    for extras in ({}, {"max_grad_norm": None, "norm_type": INF, "clear_grads": False}):
        optimizer = row.ours(parameters((257,))(), **row.rich, fused=True, **extras)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        (p,) = all_params(optimizer)
        grad = random_grad(p)
        p.grad = grad * 64
        scaler.step(optimizer)
        assert_equal(p.grad, grad)


@pytest.mark.parametrize("shape", [(), (257,)])
@pytest.mark.parametrize("extras", [{"max_grad_norm": 1e6}, {"ema_dtype": torch.float32}], ids=str)
def test_torchs_part(shape: tuple[int, ...], extras: dict[str, Any]) -> None:
    """A state of another dtype is stepped by torch's code, and unscaled as in the kernels."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    values, buffer = torch.randn(shape).half(), torch.randn(shape)
    grad = random_grad(values)
    ours, stock = Parameter(values.clone()), Parameter(values.clone())
    optimizer = fastsgd.SGD([ours], **options, fused=True, **extras)
    twin = torch.optim.SGD([stock], **options, foreach=False)
    for p, o in ((ours, optimizer), (stock, twin)):
        o.state[p]["momentum_buffer"] = buffer.clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    ours.grad, stock.grad = grad * 64, grad.clone()
    scaler.step(optimizer)
    twin.step()
    assert_equal(ours.detach(), stock.detach())
    assert_equal(ours.grad, grad if "ema_dtype" in extras else grad * 64)
