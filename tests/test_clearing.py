"""``clear_grads``: what a step leaves in the grads; and all extras at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import DTYPES, HALVES, LAYOUTS, ORDINARY_SHAPES, TAKE_FUSED, TAKE_SPARSE, Layout, Row
from onepass import INF, NAN, Averages, ClippedStep, Extended, Own, all_dtypes, copies, with_extras
from oracle import all_params, assert_equal
from snapshot import Snapshot
from test_modes import Counting
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

BUILD = parameters(*ORDINARY_SHAPES, (257,))
HOW = (True, "zero")
every_way = pytest.mark.parametrize("how", HOW, ids=str)


def plain(p: Tensor) -> Tensor | None:
    return random_grad(p)


def some(p: Tensor) -> Tensor | None:
    return random_grad(p) if p.numel() % 2 else None


def requiring_grad(p: Tensor) -> Tensor | None:
    return random_grad(p).requires_grad_()


def recorded(p: Tensor) -> Tensor | None:
    return random_grad(p).requires_grad_() * 2


def negated(p: Tensor) -> Tensor | None:
    return torch._neg_view(random_grad(p))


def half_of_one_tensor(p: Tensor) -> Tensor | None:
    return torch.stack([random_grad(p), torch.full_like(p, 7.0)], -1)[..., 0].detach()


KINDS = (plain, some, requiring_grad, recorded, negated, half_of_one_tensor)


def assert_cleared(twins: Twins, how: Any, held: list[Tensor | None]) -> None:
    """What is left in ``.grad`` is what stock's ``zero_grad`` leaves there."""
    twins.stock.zero_grad(how is True)
    for (p, q), grad in zip(twins.pairs(), held, strict=True):
        assert p.grad is (None if how is True else grad), "the same tensor object"
        if p.grad is not None:
            mine, theirs = p.grad, q.grad
            if mine.is_sparse:
                mine, theirs = mine.to_dense(), theirs.to_dense()
            assert_equal(mine, torch.zeros_like(mine))
            assert_equal(mine.requires_grad, theirs.requires_grad)
            assert mine.grad_fn is None and mine.is_leaf


def step_and_clear(twins: Twins, how: Any, make: Callable[[Tensor], Tensor | None]) -> None:
    """Give grads, step both, look at what is left."""
    twins.grads(make)
    held = [p.grad for p in all_params(twins.ours)]
    twins.step()
    for p, q in twins.pairs():
        assert_equal(p.detach(), q.detach())
    assert_cleared(twins, how, held)


@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.5, "clip_grad_value": 0.2}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_way
def test_after_the_step(row: Row, how: Any, dtype: torch.dtype, kind: Any, clip: Any) -> None:
    """The step is the one without clearing, whatever the grads are."""
    build = parameters(*ORDINARY_SHAPES, (257,), dtype=dtype)
    extras = {"clear_grads": how, **clip}
    if dtype in HALVES:  # no step of stock's to compare with: that of ours
        twins = Twins(with_extras(row, **extras), build, **row.rich)
        twins.stock = row.ours(copy.deepcopy(all_params(twins.ours)), **row.rich, **clip)
    else:
        twins = Extended(row, build, extras, **row.rich)
    for _ in range(3):
        step_and_clear(twins, how, kind)


@pytest.mark.parametrize(
    "layout",
    [each for each in LAYOUTS if not each.name.startswith(("contiguous", "huge"))],
    ids=repr,
)
@every_way
def test_layouts(row: Row, how: Any, layout: Layout) -> None:
    """Zeros go where the grads are, and nowhere beside them; repeated elements too."""

    def build() -> list[Tensor]:
        return [Parameter(layout.param(torch.randn(layout.size)))]

    twins = Extended(row, build, {"clear_grads": how}, **row.plain)

    def make(p: Tensor) -> Tensor:
        return layout.grad(random_grad(torch.empty(p.shape)))

    step_and_clear(twins, how, make)
    memory = torch.full((40, 99), 7.0)
    optimizer = row.ours(parameters((40, 33))(), **row.plain, clear_grads="zero")
    (p,) = all_params(optimizer)
    p.grad = memory[:, 1::3]
    p.grad.copy_(random_grad(p))
    optimizer.step()
    assert memory.count_nonzero() == 40 * 66 and memory.amax() == 7


@pytest.mark.parametrize("row", TAKE_SPARSE, ids=repr)
@every_way
def test_sparse_grads(row: Row, how: Any) -> None:
    """A sparse grad beside dense ones."""

    def make(p: Tensor) -> Tensor:
        if p.shape != (33, 17):
            return random_grad(p)
        index, values = torch.tensor([[0, 30, 7, 30]]), torch.randn(4, 17)
        return torch.sparse_coo_tensor(index, values, p.shape, check_invariants=True)

    for options in row.sparse:
        twins = Extended(row, BUILD, {"clear_grads": how}, **options)
        for _ in range(2):
            step_and_clear(twins, how, make)


@pytest.mark.parametrize("extras", [{}, {"max_grad_norm": 0.1, "ema_decay": 0.9}], ids=str)
@every_way
def test_closures(row: Row, how: Any, extras: Any) -> None:
    """The grads that the closure makes are stepped with, and cleared after; its loss returned."""
    losses = []
    nets = []
    for cls, more in ((row.ours, {"clear_grads": how, **extras}), (row.ours, extras)):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
        nets.append(net)
        optimizer = cls(net.parameters(), **row.rich, **more)

        def closure(net: Any = net, optimizer: Any = optimizer, more: Any = more) -> Tensor:
            if "clear_grads" not in more:
                optimizer.zero_grad()
            loss = net(torch.full((4, 9), 0.3)).square().mean()
            loss.backward()
            return loss

        losses.append([])
        for _ in range(4):
            losses[-1].append(optimizer.step(closure).detach())
            if more.get("clear_grads"):
                for p in net.parameters():
                    assert p.grad is None if how is True else not p.grad.any()
    assert_equal(*losses)
    assert_equal(*(list(net.state_dict().values()) for net in nets))
    assert len({loss.item() for loss in losses[0]}) == 4


@every_way
def test_after_a_skipped_step(row: Row, how: Any) -> None:
    """Grads with an infinity are cleared with the others; one that raises leaves them."""
    for value in (INF, NAN):
        extras = {"clear_grads": how, "skip_nonfinite": True}
        twins = Extended(row, BUILD, extras, **row.rich)
        twins.run(1)
        twins.grads()
        held = [p.grad for p in all_params(twins.ours)]
        held[-1][256] = value
        before = copies(all_params(twins.ours))
        twins.step()
        assert_equal(copies(all_params(twins.ours)), before)
        assert_cleared(twins, how, held)
        twins.run(1)
        twins.ours.skip_nonfinite, twins.ours.error_if_nonfinite = False, True
        twins.grads()
        all_params(twins.ours)[-1].grad[256] = value
        snapshot = Snapshot(twins.ours)
        with pytest.raises(RuntimeError, match="non-finite"):
            twins.ours.step()
        snapshot.assert_unchanged()


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)
@every_way
def test_under_a_scaler(row: Row, how: Any, overflow: bool) -> None:
    """A fused step clears, the one that the scaler skips too."""
    optimizer = row.ours(BUILD(), **row.rich, fused=True, clear_grads=how)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))
    for p in all_params(optimizer):
        p.grad = random_grad(p) * 64
    held = [p.grad for p in all_params(optimizer)]
    if overflow:
        held[0][0, 0] = INF
    scaler.step(optimizer)
    for p, grad in zip(all_params(optimizer), held, strict=True):
        assert p.grad is None if how is True else p.grad is grad and not grad.any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "set later"])
@pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)
def test_a_copy_under_a_scaler(row: Row, how: str) -> None:
    """It clears what overflowed, as the original does, and so goes on."""
    p = Parameter(torch.ones(3))
    optimizer = row.ours([p], **row.rich, fused=True, clear_grads=how != "set later")
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif how == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    if how == "set later":
        optimizer = copy.deepcopy(optimizer)
        optimizer.clear_grads = True
    (p,) = all_params(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for factor in (1.0, INF, 1.0):
        before = p.detach().clone()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert p.grad is None and torch.equal(p, before) == (factor == INF)


def rising(step: int) -> float:
    return min(0.99, (1 + step) / (10 + step))


@pytest.mark.parametrize("norm_type", [2.0, INF])
@pytest.mark.parametrize("decay", [0.9, rising], ids=["constant", "rising"])
@every_way
def test_all_at_once(row: Row, how: Any, decay: Any, norm_type: float) -> None:
    """30 steps over groups and dtypes with late, lost and overflown grads: each extra does its."""
    extras = {"max_grad_norm": 2.0, "norm_type": norm_type, "clip_grad_value": 0.1}
    extras |= {"skip_nonfinite": True, "ema_decay": decay, "clear_grads": how}

    def build() -> list[dict[str, Any]]:
        makes = (all_dtypes((33, 5), (257,)), parameters((1025,), (4, 3, 3, 3)), all_dtypes((7,)))
        options = ({}, {"lr": 0.01}, {**row.plain, "maximize": True})
        return [{"params": make(), **o} for make, o in zip(makes, options, strict=True)]

    twins = Extended(row, build, {**extras, "ema_dtype": torch.float32}, **row.rich)
    averages = Averages(twins.ours, decay, torch.float32)
    norms = set()
    for step in range(30):
        twins.grads(
            lambda p, step=step: random_grad(p) if p.numel() % 6 <= step < 24 - p.dim() else None
        )
        held = [p.grad for p in all_params(twins.ours)]
        overflow = step in (0, 7, 8, 20)
        if overflow:
            next(g for g in held if g is not None).view(-1)[-1] = NAN if step % 2 else INF
        else:
            averages.watch()
            expected = ClippedStep(row, twins.ours) if any(g is not None for g in held) else None
        twins.step()
        twins.check()
        if not overflow:
            averages.check()
            if expected:
                expected.check()
        norms.add(twins.ours.grad_norm.item())
        assert_cleared(twins, how, held)
    assert twins.ours.skipped_steps == 4 and len(norms) > 20
    assert twins.ours.state_dict()["param_groups"][0]["ema_steps"] == 26


def test_expanded_grads_anywhere(row: Row) -> None:
    """First in a group or last, alone or not: they are zeroed when the step is done."""
    for expanded in ((0,), (3,), (1, 3), (2, 4)):
        sides = []
        for cls in (row.ours, row.stock):
            torch.manual_seed(1)
            params = parameters(*[(33,)] * 5)()
            groups = [{"params": params[:3]}, {"params": params[3:]}]
            extras = {"clear_grads": "zero"} if cls is row.ours else {"foreach": False}
            sides.append(cls(groups, **row.rich, **extras))
            for i, p in enumerate(params):
                p.grad = random_grad(p)[:1].expand(33) if i in expanded else random_grad(p)
            sides[-1].step()
        for p, q in zip(*map(all_params, sides), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)
            assert not p.grad.any()


@pytest.mark.parametrize("how", ["alone", "expanded", "subclass", "mode"])
def test_grads_that_cannot_be_zeroed(row: Row, how: str) -> None:
    """A view in a graph, a tensor of inference mode: refused before anything is written."""
    graph = torch.ones(2, 33, requires_grad=True) * 2
    with torch.inference_mode():
        inference = torch.ones(33)
    for grad, what in ((graph[0], "is a view in a graph"), (inference, "is an inference tensor")):
        params = parameters(*[(33,)] * 3)()
        if how == "subclass":
            params[1] = params[1].detach().as_subclass(Own).requires_grad_()
        optimizer = row.ours(params, **row.rich, clear_grads="zero")
        for p in params:
            p.grad = random_grad(p)
        optimizer.step()
        for p in params:
            p.grad = random_grad(p)[:1].expand(33) if how == "expanded" else random_grad(p)
        params[1].grad = grad
        snapshot = Snapshot(optimizer)
        mode = Counting() if how == "mode" else nullcontext()
        with pytest.raises(RuntimeError, match=f"grad {what}"), mode:
            optimizer.step()
        snapshot.assert_unchanged()
        optimizer.clear_grads = True
        optimizer.step()
        assert all(p.grad is None for p in params)
