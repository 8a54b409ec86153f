"""Clipping by norm and by value inside of the step, the norm it tells, and steps it skips."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EXACT,
    HALVES,
    HUGE,
    LAYOUTS,
    ORDINARY_SHAPES,
    SIZES,
    TAKE_SPARSE,
    Layout,
    Row,
    label,
)
from onepass import INF, NAN, ClippedStep, Extended, all_dtypes, assert_norm, copies
from oracle import all_params, assert_equal
from torch import Tensor
from torch.nn import Parameter
from twins import parameters, random_grad

CLIPS: tuple[dict[str, Any], ...] = (
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 7, "clip_grad_value": 0.01},
    {"max_grad_norm": 0.3, "norm_type": INF},
    {"max_grad_norm": 0.3, "norm_type": INF, "clip_grad_value": 0.2},
    {"max_grad_norm": 1e9},
    {"max_grad_norm": INF},
    {"max_grad_norm": 0},
    {"clip_grad_value": 0.1},
    {"clip_grad_value": 0},
    {"clip_grad_value": INF},
    {"skip_nonfinite": True},
    {"error_if_nonfinite": True},
    {"max_grad_norm": 0.5, "clip_grad_value": 0.1, "skip_nonfinite": True},
)
SHAPES = (*ORDINARY_SHAPES, *[(n,) for n in SIZES], (4097,))
every_clip = pytest.mark.parametrize("extras", CLIPS, ids=label)


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@every_clip
def test_bit_identical(row: Row, extras: Any, dtype: torch.dtype, rich: bool) -> None:
    """The step that stock makes of grads clipped before it; the grads stay as they are."""
    options = row.rich if rich else row.plain
    twins = Extended(row, parameters(*SHAPES, dtype=dtype), extras, **options)
    start = copies(all_params(twins.ours))
    twins.run(4)
    if 0 not in (extras.get("max_grad_norm"), extras.get("clip_grad_value")):
        for p, before in zip(all_params(twins.ours), start, strict=True):
            assert p.numel() < 100 or not torch.equal(p.detach(), before), "nothing moved"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_clip
def test_halves(row: Row, extras: Any, dtype: torch.dtype) -> None:
    """Half grads are clipped in single precision, and the step rounds once."""
    optimizer = row.ours(parameters(*SHAPES, dtype=dtype)(), **row.rich, **extras)
    for _ in range(4):
        for p in all_params(optimizer):
            p.grad = random_grad(p)
        expected = ClippedStep(row, optimizer)
        before = copies(p.grad for p in all_params(optimizer))
        optimizer.step()
        expected.check()
        assert_equal([p.grad for p in all_params(optimizer)], before)
        if len(extras) != 1 or "clip_grad_value" not in extras:
            assert_norm(optimizer.grad_norm, before, extras.get("norm_type", 2.0))


@every_clip
def test_several_dtypes(row: Row, extras: Any) -> None:
    """One norm over all dtypes and groups, of which some have no grads at first."""

    def build() -> list[dict[str, Any]]:
        groups = [all_dtypes((65,), (7, 5)), parameters((1025,)), all_dtypes((17,), (257,))]
        options = (row.plain, {"lr": 0.01}, {})
        return [{"params": make(), **o} for make, o in zip(groups, options, strict=True)]

    twins = Extended(row, build, extras, **row.rich)
    for step in range(5):
        twins.grads(lambda p, step=step: random_grad(p) if step != p.numel() % 3 else None)
        expected = ClippedStep(row, twins.ours)
        twins.step()
        twins.check()
        expected.check()


@pytest.mark.parametrize(
    "layout", [each for each in LAYOUTS if not each.name.startswith("contiguous")], ids=repr
)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_layouts(row: Row, layout: Layout, dtype: torch.dtype) -> None:
    """However parameter and grad lie in memory: each element counts once, the gaps do not."""
    memory = parameters((layout.size,), dtype=dtype)

    def build() -> list[Tensor]:
        return [Parameter(layout.param(memory()[0].detach())), *parameters((33,), dtype=dtype)()]

    twins = Extended(row, build, {"max_grad_norm": 0.5, "clip_grad_value": 0.1}, **row.plain)
    for _ in range(2):
        twins.grads(
            lambda p: (
                layout.grad(random_grad(torch.empty(p.shape, dtype=dtype)))
                if p.shape != (33,)
                else random_grad(p)
            )
        )
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("dtypes", [*((t,) for t in DTYPES), DTYPES], ids=str)
def test_order_groups_and_threads(row: Row, dtypes: Any, norm_type: float) -> None:
    """The bits of the norm, and so of the step, depend on nothing but the grads."""
    shapes = ((HUGE,), (513, 1023), *[(n,) for n in SIZES], (100_003,), *[(64,)] * 9)
    torch.manual_seed(2)
    start = all_dtypes(*shapes, dtypes=dtypes)()
    grads = [random_grad(p) for p in start]
    norms, results = [], []
    ways = [(1, 0, 1), (2, 1, 1), (3, 2, 5), (8, 0, len(start)), (1, 3, 3), (2, 0, 1)]
    for threads, shuffle, groups in ways:
        torch.set_num_threads(threads)
        params = [Parameter(p.detach().clone()) for p in start]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        order = random.Random(shuffle).sample(params, len(params)) if shuffle else params
        parts = [{"params": order[i::groups]} for i in range(groups)]
        optimizer = row.ours(parts, **row.rich, max_grad_norm=0.5, norm_type=norm_type)
        optimizer.step()
        norms.append(optimizer.grad_norm)
        results.append([p.detach() for p in params])
    assert_norm(norms[0], grads, norm_type)
    for norm, result in zip(norms[1:], results[1:], strict=True):
        assert_equal(norm, norms[0])
        assert_equal(result, results[0])


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("spread", ["large", "small", "wide", "subnormal", "overflow"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_magnitudes(row: Row, dtype: torch.dtype, spread: str, norm_type: float) -> None:
    """Squares that overflow or vanish spoil no norm that is itself a number of the dtype."""
    most = 37 if dtype == torch.float32 else 306
    low, high = {
        "large": (most - 1, most),
        "small": (-most, 1 - most),
        "wide": (-most, most),
        "subnormal": (-most - 6, -most - 1),
        "overflow": (most + 1, most + 1.9),
    }[spread]
    extras = {"max_grad_norm": 0.5, "norm_type": norm_type}
    twins = Extended(row, parameters((257,), (1025,), dtype=dtype), extras, **row.plain)

    def make(p: Tensor) -> Tensor:
        exponents = torch.rand(p.shape, dtype=torch.float64) * (high - low) + low
        return (random_grad(p).sign() * 10**exponents).to(dtype)

    for _ in range(2):
        twins.grads(make)
        twins.step()
        twins.check()
    if spread == "overflow" and norm_type == 2:
        assert twins.ours.grad_norm.isinf(), "each grad is finite, but no number is their norm"


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    "extras", [e for e in CLIPS if not any(v is True for v in e.values())], ids=label
)
def test_nonfinite_grads(row: Row, extras: Any, dtype: torch.dtype, value: float) -> None:
    """Unless told otherwise an infinity or NaN goes on as through torch's functions."""
    twins = Extended(row, parameters((257,), (17, 3), (9,), dtype=dtype), extras, **row.rich)
    twins.run(1)
    for at in (0, 256):
        twins.grads()
        for optimizer in twins.sides:
            all_params(optimizer)[0].grad[at] = value
        twins.step()
        twins.check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_values_changed_between_steps(row: Row, dtype: torch.dtype) -> None:
    """Each attribute is read at every step."""
    twins = Extended(row, parameters(*ORDINARY_SHAPES, dtype=dtype), {}, **row.rich).run(2)
    for extras in (*CLIPS, *CLIPS[::-1]):
        for name in ("error_if_nonfinite", "skip_nonfinite"):  # never both
            setattr(twins.ours, name, False)
        for name in ("max_grad_norm", "clip_grad_value"):
            setattr(twins.ours, name, extras.get(name))
        for name, value in extras.items():
            setattr(twins.ours, name, value)
            assert getattr(twins.ours, name) == value
        twins.run(1)


def test_norm_that_is_told(row: Row) -> None:
    """None until one was computed; then a new tensor each time, that later steps leave alone."""
    twins = Extended(row, parameters((33, 5), (17,)), {}, **row.rich).run(1)
    ours = twins.ours
    assert ours.grad_norm is None
    ours.clip_grad_value = 0.1
    twins.run(1)
    assert ours.grad_norm is None, "clipping by value needs no norm"
    ours.max_grad_norm = 0.5
    told = []
    for _ in range(3):
        twins.run(1)
        told.append((ours.grad_norm, ours.grad_norm.item()))
    assert len({value for _, value in told}) == 3
    assert all(norm.item() == value for norm, value in told)
    twins.grads(lambda p: None)
    twins.step()
    twins.check()
    assert ours.grad_norm == 0


# Parameters that torch's own code must step.


@every_clip
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(row: Row, extras: Any, dtype: torch.dtype) -> None:
    """Complex parameters beside real ones: the size of a number counts, not its parts."""
    if "clip_grad_value" in extras:
        pytest.skip("torch clamps no complex grads")

    def build() -> list[Tensor]:
        return [Parameter(torch.randn(33, 5, dtype=dtype)), *parameters((257,), (3, 5))()]

    twins = Extended(row, build, extras, **row.rich)
    twins.run(3, lambda p: torch.randn_like(p, requires_grad=False))


@pytest.mark.parametrize("extras", [e for e in CLIPS if "clip_grad_value" not in e], ids=label)
@pytest.mark.parametrize("row", TAKE_SPARSE, ids=repr)
def test_sparse_grads(row: Row, extras: Any) -> None:
    """Sparse grads beside dense ones count with their values, the same index twice with the sum."""

    def make(p: Tensor) -> Tensor:
        if p.shape != (33, 5):
            return random_grad(p)
        index = torch.tensor([[0, 30, 7, 30]])
        return torch.sparse_coo_tensor(index, torch.randn(4, 5), p.shape, check_invariants=True)

    for options in row.sparse:
        twins = Extended(row, parameters((33, 5), (257,), (5, 33)), extras, **options)
        for _ in range(3):
            twins.grads(make)
            twins.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())


def test_grads_of_another_dtype(row: Row) -> None:
    """What torch takes after a change of a parameter's dtype is clipped in its code."""
    params = [Parameter(torch.randn(5)), Parameter(torch.randn(3, 4))]
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizer = row.ours(params, **row.plain, max_grad_norm=0.5)
    stock = row.stock(twins, **row.plain, foreach=False)
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    for p in (params[0], twins[0]):
        p.data = p.data.double()
    torch.nn.utils.clip_grad_norm_(twins, 0.5)
    try:
        stock.step()
    except RuntimeError:
        pytest.skip("torch does not take them")
    before = copies(p.grad for p in params)
    optimizer.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())
    assert_equal(copies(p.grad for p in params), before)
