"""``torch.amp.GradScaler('cpu')``: overflow, unscaling, and what is left in the grads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, HALVES, ORDINARY_SHAPES, TAKE_FUSED, Row, flagged
from oracle import Float64Step, all_params, assert_equal
from torch import Tensor
from twins import ORDINARY, Twins, check_state, parameters, random_grad

SCALE = 1024.0
fused = pytest.mark.parametrize("row", TAKE_FUSED, ids=repr)
# For each step: does it overflow?
HISTORIES = {
    "never": [0, 0, 0, 0],
    "first": [1, 0, 0, 0],
    "first_two": [1, 1, 0, 0, 0],
    "later": [0, 0, 1, 0, 0],
    "later_twice": [0, 1, 1, 0, 1, 0],
    "always": [1, 1, 1],
}


class Scaled:
    """Twins, each with a scaler of its own."""

    def __init__(self, twins: Twins, **options: Any) -> None:
        """Make scalers; ``scale`` is called once, since that is what makes their tensors."""
        self.twins = twins
        make = {"init_scale": SCALE, "growth_interval": 3, **options}
        self.scalers = [torch.amp.GradScaler("cpu", **make) for _ in twins.sides]
        for scaler in self.scalers:
            scaler.scale(torch.ones(()))

    def grads(self, overflow: bool, where: int = 1, value: float = float("inf")) -> None:
        """Give random grads times the current scale, one of them with an infinity in it."""

        def make(p: Tensor) -> Tensor:
            return random_grad(p) * scale

        scale = self.scalers[0].get_scale()
        assert self.scalers[1].get_scale() == scale
        self.twins.grads(make)
        if overflow:
            for optimizer in self.twins.sides:
                all_params(optimizer)[where].grad.flatten()[0:1].fill_(value)

    def step(self, unscale: bool = False) -> list[Any]:
        """Step both through their scalers and update these."""
        results = []
        for scaler, optimizer in zip(self.scalers, self.twins.sides, strict=True):
            if unscale:
                scaler.unscale_(optimizer)
            results.append(scaler.step(optimizer))
            scaler.update()
        assert self.scalers[0].get_scale() == self.scalers[1].get_scale()
        return results

    def check(self, grads: bool = True) -> None:
        """Parameters and states are equal; grads too unless told otherwise."""
        ours, stock = self.twins.sides
        for p, q in self.twins.pairs():
            assert_equal(p.detach(), q.detach())
            if grads:
                assert_equal(p.grad, q.grad)
            assert bool(ours.state.get(p)) == bool(stock.state.get(q))
            if q in stock.state:
                check_state(ours.state[p], stock.state[q])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(**flagged())
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_trajectories(
    row: Row, dtype: torch.dtype, flags: Any, history: str, unscale: bool
) -> None:
    """Whatever the flags, the numbers are those of stock's default path with its own scaler."""
    for options in (row.plain, row.rich, {**row.rich, "maximize": True}):
        build = parameters(*ORDINARY_SHAPES, dtype=dtype)
        scaled = Scaled(Twins(row, build, **options, **flags))
        for overflow in HISTORIES[history]:
            scaled.grads(bool(overflow))
            before = [p.detach().clone() for p in all_params(scaled.twins.ours)]
            scaled.step(unscale)
            # On overflow the default leaves unscaled grads, the fused optimizer scaled ones.
            scaled.check(grads=not (overflow and flags.get("fused")))
            if overflow:
                assert_equal([p.detach() for p in all_params(scaled.twins.ours)], before)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize(**flagged())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grads_after_the_step(
    row: Row, dtype: torch.dtype, flags: Any, overflow: bool, unscale: bool
) -> None:
    """The grads are left as stock leaves them with the same flags."""
    if dtype == torch.float16 and (unscale or not flags.get("fused")):
        pytest.skip("stock refuses to unscale float16 grads outside of a fused step")
    left = []
    for cls in (row.ours, row.stock):
        torch.manual_seed(0)
        optimizer = cls(parameters((131,), (16,), (5, 40), dtype=dtype)(), **row.rich, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for p in all_params(optimizer):
            p.grad = random_grad(p) * SCALE
        if overflow:
            all_params(optimizer)[1].grad[3] = float("nan")
        if unscale:
            scaler.unscale_(optimizer)
        pointers = [p.grad.data_ptr() for p in all_params(optimizer)]
        scaler.step(optimizer)
        assert pointers == [p.grad.data_ptr() for p in all_params(optimizer)], "in place"
        left.append([p.grad for p in all_params(optimizer)])
    assert_equal(*left)


@fused
@pytest.mark.parametrize("scale", [3.0, 1000.0, 65536.0, 0.1])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_scales_that_are_no_power_of_two(row: Row, dtype: torch.dtype, scale: float) -> None:
    """A fused step divides by the scale (stock's kernel does), and steps with that quotient."""
    options = {**row.rich, "fused": True}
    torch.manual_seed(0)
    ours = row.ours(parameters(*ORDINARY_SHAPES, dtype=dtype)(), **options)
    torch.manual_seed(0)
    plain = row.stock(parameters(*ORDINARY_SHAPES, dtype=dtype)(), **row.rich, foreach=False)
    torch.manual_seed(0)
    fused = row.stock(parameters(*ORDINARY_SHAPES, dtype=dtype)(), **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    for _ in range(3):
        for p, q, r in zip(*map(all_params, (ours, plain, fused)), strict=True):
            p.grad = random_grad(p) * scale
            r.grad = p.grad.clone()
            q.grad = p.grad / torch.tensor(scale)
        for scaler, optimizer in zip(scalers, (ours, fused), strict=True):
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        plain.step()
        for p, q, r in zip(*map(all_params, (ours, plain, fused)), strict=True):
            assert_equal(p.grad, r.grad)
            assert_equal(p.grad, q.grad)
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize(**flagged())
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("history", HISTORIES)
def test_halves(row: Row, dtype: torch.dtype, flags: Any, history: str) -> None:
    """Half types: an overflow changes nothing, the others are one float64 step."""
    if dtype == torch.float16 and not flags.get("fused"):
        pytest.skip("stock refuses to unscale float16 grads outside of a fused step")
    for options in (row.plain, row.rich):
        optimizer = row.ours(parameters(*ORDINARY_SHAPES, dtype=dtype)(), **options, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        for overflow in HISTORIES[history]:
            scale = scaler.get_scale()
            for p in all_params(optimizer):
                p.grad = random_grad(p)
            expected = Float64Step(row.stock, optimizer)
            for p in all_params(optimizer):
                p.grad *= scale
            before = [p.detach().clone() for p in all_params(optimizer)]
            if overflow:
                all_params(optimizer)[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if overflow:
                assert_equal([p.detach() for p in all_params(optimizer)], before)
            else:
                expected.check()


def test_fp16_grads_without_fused(row: Row) -> None:
    """Stock's refusal to unscale float16 grads is the scaler's, and stays."""
    optimizer = row.ours(parameters((5,), dtype=torch.float16)(), **row.rich)
    all_params(optimizer)[0].grad = torch.ones(5, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.step(optimizer)


@pytest.mark.parametrize(**flagged())
def test_mixed_dtypes_and_groups(row: Row, flags: Any) -> None:
    """float32 and float64 in groups of their own, an overflow in one of them stops both."""

    def build() -> list[dict[str, Any]]:
        return [
            {"params": parameters(*ORDINARY_SHAPES, dtype=torch.float64)()},
            {"params": ORDINARY(), **row.plain},
        ]

    scaled = Scaled(Twins(row, build, **row.rich, **flags))
    for overflow in (1, 0, 1, 0, 0):
        scaled.grads(bool(overflow), where=len(ORDINARY_SHAPES))
        scaled.step()
        scaled.check(grads=not (overflow and flags.get("fused")))


@pytest.mark.parametrize(**flagged())
def test_late_grads(row: Row, flags: Any) -> None:
    """A parameter whose first grad comes after an overflow or after the first step."""
    scaled = Scaled(Twins(row, parameters((70,), (5,), (17, 3)), **row.rich, **flags))
    for step, overflow in enumerate((1, 0, 0, 1, 0, 0)):
        scaled.grads(bool(overflow))
        for optimizer in scaled.twins.sides:
            for i, p in enumerate(all_params(optimizer)):
                if i != 1 and step < 2 * i:
                    p.grad = None
        scaled.step()
        for p, q in scaled.twins.pairs():
            assert_equal(p.detach(), q.detach())


@pytest.mark.parametrize(**flagged())
def test_hooks_on_overflow(row: Row, flags: Any) -> None:
    """As in stock, an overflow step runs the hooks of a fused optimizer only; never twice."""
    counts = []
    for cls in (row.ours, row.stock):
        optimizer = cls(parameters((70,))(), **row.rich, **flags)
        seen = [0, 0]
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.__setitem__(0, seen[0] + 1))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.__setitem__(1, seen[1] + 1))
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        trail = []
        for overflow in (1, 0, 1):
            (p,) = all_params(optimizer)
            p.grad = torch.full_like(p, float("inf") if overflow else 1.0)
            scaler.step(optimizer)
            scaler.update()
            trail.append(tuple(seen))
        counts.append(trail)
    assert counts[0] == counts[1]


@fused
def test_scaler_leaves_no_attributes(row: Row) -> None:
    """``grad_scale`` and ``found_inf`` are gone after the step; a step without is plain."""
    twins = Twins(row, parameters((70,)), **row.rich, fused=True)
    scaled = Scaled(twins)
    scaled.grads(False)
    scaled.step()
    assert not hasattr(twins.ours, "grad_scale") and not hasattr(twins.ours, "found_inf")
    twins.run(2)


@fused
def test_grad_scale_set_by_the_user(row: Row) -> None:
    """A factor that the user put on the optimizer is multiplied in, as the scaler documents."""
    scale = 8.0
    torch.manual_seed(0)
    ours = row.ours(parameters((70,))(), **row.rich, fused=True)
    torch.manual_seed(0)
    plain = row.stock(parameters((70,))(), **row.rich, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for _ in range(2):
        (p,), (q,) = all_params(ours), all_params(plain)
        q.grad = random_grad(q)
        p.grad = q.grad * scale * 4.0
        ours.grad_scale = torch.tensor(4.0)
        scaler.step(ours)
        scaler.update()
        plain.step()
        assert_equal(p.detach(), q.detach())


def test_attributes_without_a_scaler(row: Row) -> None:
    """``found_inf`` and ``grad_scale`` set by hand are honoured by a plain call of step."""
    torch.manual_seed(0)
    ours = row.ours(parameters((70,))(), **row.rich, **row.fused)
    (p,) = all_params(ours)
    p.grad = torch.full_like(p, 4.0)
    before = p.detach().clone()
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    ours.step()
    assert_equal(p.detach(), before)
    ours.found_inf = torch.tensor(0.0)
    ours.step()
    assert_equal(p.grad, torch.ones_like(p))
    ours.grad_scale = ours.found_inf = None
    twin = row.stock([torch.nn.Parameter(before)], **row.rich, foreach=False)
    all_params(twin)[0].grad = torch.ones(70)
    twin.step()
    assert_equal(p.detach(), all_params(twin)[0].detach())


@fused
def test_disabled_scaler(row: Row) -> None:
    """``GradScaler(enabled=False)`` just steps."""
    twins = Twins(row, parameters((70,)), **row.rich, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(3):
        twins.grads()
        for optimizer in twins.sides:
            scaler.step(optimizer)
        twins.check()


def test_scaler_over_layouts(row: Row) -> None:
    """Grads with gaps and foreign strides are unscaled in place, and nothing beside them."""
    for flags in ({}, row.fused, {"foreach": True}):
        torch.manual_seed(0)
        memory = torch.full((40, 99), 7.0)
        p = torch.nn.Parameter(torch.randn(99, 40).t()[:, :33])
        q = torch.nn.Parameter(p.detach().clone())
        optimizer = row.ours([p], **row.rich, **flags)
        plain = row.stock([q], **row.rich, foreach=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(torch.ones(()))
        for _ in range(3):
            q.grad = random_grad(q)
            p.grad = memory[:, 1:].t()[::3].t()[:, :33]
            p.grad.copy_(q.grad * SCALE)
            scaler.step(optimizer)
            scaler.update()
            plain.step()
            assert_equal(p.detach(), q.detach())
            assert_equal(p.grad, q.grad)
            marks = torch.ones_like(memory, dtype=torch.bool)
            marks[:, 1:].t()[::3].t()[:, :33] = False
            assert bool((memory[marks] == 7).all())


def test_training_loop_with_autocast(row: Row) -> None:
    """A model under autocast, scaler, clipping: the same losses as stock."""
    losses = []
    for cls, more in ((row.ours, row.fused), (row.ours, {}), (row.stock, {"foreach": False})):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.ReLU(), torch.nn.Linear(65, 3))
        optimizer = cls(net.parameters(), **{**row.rich, "lr": 1e-4}, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
        trail = []
        for step in range(8):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (net(torch.randn(16, 33)).float() * 16).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            trail.append((loss.item(), scaler.get_scale()))
        losses.append(trail)
    assert losses[0] == losses[1] == losses[2]
    assert losses[0][0][1] < 2.0**127, "the first step overflows"
    assert losses[0][-1][1] == losses[0][-2][1], "later ones do not"
