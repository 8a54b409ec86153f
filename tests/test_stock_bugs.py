"""Seven things that stock's ``fused=True`` gets wrong on the CPU, each right here.

Every test runs both classes with ``fused=True`` and holds ours to the truth. Stock's own outcome is
not asserted: it may be repaired.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import EXACT, HALVES, TAKE_FUSED, Row
from oracle import Float64Step, all_params, assert_equal
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

# The fixture's place.
pytestmark = pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_1_halves_longer_than_a_register(row: Row, dtype: torch.dtype) -> None:
    """Every element moves, not only those after the last whole register."""
    for n in (7, 15, 16, 17, 31, 32, 33, 64, 1000, 4097):
        for options in (row.plain, row.rich):
            p = Parameter(torch.ones(n, dtype=dtype))
            p.grad = torch.full_like(p, 2.0)
            optimizer = row.ours([p], **options, fused=True)
            expected = Float64Step(row.stock, optimizer)
            optimizer.step()
            assert bool((p != 1).all()), f"{int((p == 1).sum())} of {n} did not move"
            expected.check()


def test_2_overflow_on_the_first_step(row: Row) -> None:
    """No state is made by a step that was skipped, so nothing uninitialised is used later."""
    torch.empty(1000).fill_(float("nan"))  # what a recycled block may hold
    twins = Twins(row, parameters((1000,), (17,)), **row.rich, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for p in all_params(twins.ours):
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(twins.ours)
    scaler.update()
    assert row.eager or not any(twins.ours.state.values()), "the skipped step left a state"
    for _ in range(3):
        twins.grads()
        for p in all_params(twins.ours):
            p.grad = p.grad * scaler.get_scale()
        scaler.step(twins.ours)
        scaler.update()
        twins.stock.step()
        twins.check()


def test_3_a_first_grad_after_the_first_step(row: Row) -> None:
    """A parameter may join later."""
    twins = Twins(row, parameters((70,), (33, 5), (16,)), **row.rich, fused=True)
    for step in range(4):
        twins.grads()
        for optimizer in twins.sides:
            for p in all_params(optimizer)[step + 1 :]:
                p.grad = None
        twins.step()
        twins.check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_4_parameter_and_grad_with_other_strides(row: Row, dtype: torch.dtype) -> None:
    """Transposed and channels_last parameters with contiguous grads, and the other way round."""
    twins = Twins(
        row,
        lambda: [
            Parameter(torch.randn(33, 17, dtype=dtype).t()),
            Parameter(torch.randn(33, 17, dtype=dtype)),
            Parameter(torch.randn(4, 5, 6, 7, dtype=dtype).to(memory_format=torch.channels_last)),
        ],
        **row.rich,
        fused=True,
    )
    for _ in range(3):
        grads = [random_grad(torch.empty(p.shape, dtype=dtype)) for p in all_params(twins.ours)]
        grads[1] = grads[1].t().contiguous().t()
        for optimizer in twins.sides:
            for p, g in zip(all_params(optimizer), grads, strict=True):
                p.grad = g.clone()
                assert p.grad.stride() != p.stride()
        twins.step()
        twins.check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_5_slice_with_ordinary_autograd(row: Row, dtype: torch.dtype) -> None:
    """``base[:, :16]``: the 64 columns beside it stay as they were."""
    bases = []

    def build() -> list[torch.Tensor]:
        base = torch.randn(20, 80, dtype=dtype)
        bases.append(base)
        return [base[:, :16].requires_grad_()]

    for options in (row.plain, row.rich):
        bases.clear()
        twins = Twins(row, build, **options, fused=True)
        beside = bases[0][:, 16:].clone()
        for _ in range(3):
            for optimizer in twins.sides:
                (p,) = all_params(optimizer)
                optimizer.zero_grad()
                (p**2).sum().backward()
            twins.step()
            twins.check()
            assert_equal(bases[0][:, 16:], beside)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_6_expanded_grad(row: Row, dtype: torch.dtype) -> None:
    """A grad of stride 0 holds one number, for all elements."""
    for options in (row.plain, row.rich):
        twins = Twins(row, parameters((1000,), (33, 17), dtype=dtype), **options, fused=True)
        for step in range(3):
            for p in all_params(twins.ours):
                p.grad = torch.full((), 0.3 * (step + 1), dtype=dtype).expand(p.shape)
            for p in all_params(twins.stock):
                p.grad = torch.full(p.shape, 0.3 * (step + 1), dtype=dtype)
            twins.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_7_checkpoint_saved_with_fused(row: Row, dtype: torch.dtype) -> None:
    """Loading it does not put stock's fused code into use."""
    saver = row.stock(parameters((1000,), dtype=dtype)(), **row.rich, fused=True)
    all_params(saver)[0].grad = torch.ones(1000, dtype=dtype)
    saver.step()
    p = Parameter(torch.ones(1000, dtype=dtype))
    loader = row.ours([p], **row.rich)
    loader.load_state_dict(copy.deepcopy(saver.state_dict()))
    for _ in range(3):
        p.grad = random_grad(p)
        before = p.detach().clone()
        expected = Float64Step(row.stock, loader)
        loader.step()
        expected.check()
        assert float((p != before).float().mean()) > 0.9
    # The fallback does not use it either.
    with torch.no_grad():
        type(loader).step.__wrapped__.__wrapped__(row.ours([p], **row.rich))


def test_7_checkpoint_saved_with_fused_and_complex(row: Row) -> None:
    """Nor are parameters refused that the fused code does not know."""
    saver = row.stock(parameters((5,))(), **row.rich, fused=True)
    z = Parameter(torch.ones(5, dtype=torch.complex64))
    loader = row.ours([z], **row.rich)
    loader.load_state_dict({**copy.deepcopy(saver.state_dict()), "state": {}})
    z.grad = torch.ones(5, dtype=torch.complex64)
    loader.step()
    assert bool((z != 1).all())
