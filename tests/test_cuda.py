"""What only a CUDA device can show: graphs, streams, launches and waits, stock's own kernels."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EXACT, ORDINARY_SHAPES, Row
from oracle import all_params, assert_equal
from places import Place, assert_alike, give, on_device, step_here, there_and_here
from torch import Tensor
from torch.nn import Parameter
from twins import ORDINARY, parameters, random_grad

import fastsgd
from fastsgd import _C
from fastsgd.bench.device import asked_of_device

pytestmark = on_device
CUDA = Place()
Optimizer = torch.optim.Optimizer


def fused_there(row: Row) -> dict[str, bool]:
    """Return the flag ``fused``, where stock has such code for CUDA (torch 2.11's Adagrad not)."""
    try:
        stock = row.stock([torch.zeros(1, device="cuda", requires_grad=True)], **row.fused)
        give([stock], 0)
        stock.step()
    except RuntimeError:
        return {}
    return row.fused


def on_cuda(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return random parameters there."""
    return CUDA.bring(parameters(*shapes, dtype=dtype)())


def values(optimizer: Optimizer) -> list[Any]:
    """Parameters and states, copied."""
    return [
        [p.detach().clone(), {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()}]
        for p in all_params(optimizer)
    ]


# --- no waiting ---------------------------------------------------------------------------------


def no_wait(act: Callable[[], Any]) -> Any:
    """Do it where whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return act()
    finally:
        torch.cuda.set_sync_debug_mode("default")


ONE_PASS = {"max_grad_norm": 0.5, "clip_grad_value": 0.1, "skip_nonfinite": True, "ema_decay": 0.9}


@pytest.mark.parametrize("extras", [{}, ONE_PASS, {**ONE_PASS, "clear_grads": "zero"}])
def test_nothing_waits(row: Row, extras: dict[str, Any]) -> None:
    """Not the first step, which makes the states; nor later ones, new grads, zeros."""
    optimizer = row.ours(on_cuda(*ORDINARY_SHAPES, (70_001,)), **row.rich, **extras)
    for step in range(4):
        give([optimizer], step)
        no_wait(lambda: CUDA.step(optimizer))
    no_wait(lambda: optimizer.zero_grad(set_to_none=False))
    no_wait(lambda: optimizer.grad_norm)
    no_wait(lambda: fastsgd.clip_grad_norm_(all_params(optimizer), 1.0))


def launches_and_waits(act: Callable[[], Any]) -> tuple[int, int, int]:
    """Count kernels launched, copies and waits, by what the profiler saw the host call."""
    torch.cuda.synchronize()
    asked = asked_of_device(act)
    return asked["launches"], asked["copies"], asked["waits"]


def test_one_launch_a_dtype(row: Row) -> None:
    """As counted by the profiler, with new grads: an upload a dtype, where they fill a table."""
    dtypes = (torch.float32, torch.bfloat16)
    params = [Parameter(torch.zeros(2, dtype=dtypes[i % 2], device="cuda")) for i in range(10_000)]
    optimizer = row.ours([{"params": params[g::465]} for g in range(465)], **row.rich)
    for step in range(3):
        kept = [p.grad for p in params]
        give([optimizer], step)
        if step:
            launches, copies, waits = launches_and_waits(optimizer.step)
            assert (launches, waits) == (2, 0) and copies <= 2, (launches, copies, waits)
        else:
            CUDA.step(optimizer)
        del kept
    assert launches_and_waits(optimizer.step) == (2, 0, 0)
    assert launches_and_waits(lambda: optimizer.zero_grad(set_to_none=False))[0] == 1


def test_memory_is_flat(row: Row) -> None:
    optimizer = row.ours(on_cuda(*ORDINARY_SHAPES), **row.rich)
    seen = []
    for step in range(200):
        give([optimizer], step)
        CUDA.step(optimizer)
        if step == 20:
            gc.collect()  # what other tests left
        if step >= 20:
            seen.append(torch.cuda.memory_allocated())
    assert len(set(seen)) <= 2
    del optimizer
    gc.collect()
    assert torch.cuda.memory_allocated() < seen[-1]


# --- as stock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_near_stock(row: Row, dtype: torch.dtype) -> None:
    """Stock's default for CUDA rounds and fuses otherwise: a few units apart after some steps."""
    sides = []
    for cls in (row.ours, row.stock):
        torch.manual_seed(1)
        sides.append(cls(on_cuda(*ORDINARY_SHAPES, dtype=dtype), **copy.deepcopy(row.rich)))
    eps = torch.finfo(dtype).eps
    for step in range(5):
        give(sides, step)
        CUDA.step(sides[0])
        sides[1].step()
        for p, q in zip(*map(all_params, sides), strict=True):
            torch.testing.assert_close(p, q, rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}])
def test_checkpoints_go_both_ways(row: Row, flags: dict[str, bool]) -> None:
    """Whatever flags stock was run with; counters end up on the device, where a step counts."""
    if not row.takes(*flags) or ("fused" in flags and not fused_there(row)):
        pytest.skip("stock has no such code")
    torch.manual_seed(1)
    stock = row.stock(on_cuda(*ORDINARY_SHAPES), **row.rich, **flags)
    give([stock], 0)
    stock.step()
    ours = row.ours([Parameter(p.detach().clone()) for p in all_params(stock)], **row.rich)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))  # or they would share the states
    for step in range(1, 4):
        give([stock, ours], step)
        CUDA.step(ours)
        stock.step()
        for p, q in zip(all_params(ours), all_params(stock), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for states in ours.state.values():
        assert all(value.is_cuda for value in states.values() if isinstance(value, Tensor))
        assert not row.counts or int(states["step"]) == 4
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    give([stock], 9)
    stock.step()


def test_a_checkpoint_of_the_cpu(row: Row) -> None:
    """It goes on as on the CPU."""
    there, here = there_and_here(CUDA, row, ORDINARY, **row.rich)
    for step in range(2):
        give([here], step)
        step_here(here)
    with torch.no_grad():
        for p, q in zip(all_params(there), all_params(here), strict=True):
            p.copy_(q)
    there.load_state_dict(here.state_dict())
    for step in range(2, 5):
        give([there, here], step)
        CUDA.step(there)
        step_here(here)
        assert_alike(there, here)


def test_scaler(row: Row) -> None:
    """GradScaler hands its values to the step where the class takes them; else unscales before."""

    def train(optimizer: Optimizer, overflows: set[int]) -> None:
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
        for step in range(6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            params = all_params(optimizer)
            loss = sum((p * random_grad(p)).sum() for p in params)
            scaler.scale(loss).backward()
            if step in overflows:
                params[0].grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()

    for overflows in ({0}, {2}, {2, 3}, set()):
        if 0 in overflows and not row.counts:
            continue  # stock's fused step leaves the buffer of a skipped first one uninitialised
        sides = []
        for cls in (row.ours, row.stock):
            torch.manual_seed(1)
            sides.append(cls(on_cuda((33, 17), (17,)), **row.rich, **fused_there(row)))
            train(sides[-1], overflows)
        for p, q in zip(*map(all_params, sides), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        if row.counts:
            counted = [[int(s["step"]) for s in side.state.values()] for side in sides]
            assert counted[0] == counted[1] == [6 - len(overflows)] * 2


def test_sparse_grads_are_torchs(row: Row) -> None:
    """While the others take the kernels."""
    if not row.sparse:
        pytest.skip("stock takes none")
    sides = []
    for cls in (row.ours, row.stock):
        torch.manual_seed(1)
        sides.append(cls(on_cuda((20, 3), (7,)), **row.sparse[0]))
        first, second = all_params(sides[-1])
        torch.manual_seed(2)
        first.grad = torch.randn(20, 3, device="cuda").to_sparse(1)
        second.grad = torch.randn(7, device="cuda")
        sides[-1].step()
    for p, q in zip(*map(all_params, sides), strict=True):
        torch.testing.assert_close(p, q)


def test_cpu_and_cuda_parameters_together(row: Row) -> None:
    there, here = there_and_here(CUDA, row, parameters((33, 17), (17,), (131,)), **row.rich)
    both = row.ours(
        [p for pair in zip(all_params(there), all_params(here), strict=True) for p in pair],
        **row.rich,
    )
    for step in range(3):
        give([there, here], step)
        CUDA.step(both)
        for p, q in zip(all_params(there), all_params(here), strict=True):
            assert_equal(p.detach().cpu(), q.detach())


def test_several_devices(row: Row) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    here = row.ours(parameters((131,), (131,))(), **row.rich)
    copies = [p.detach().to(f"cuda:{i}", copy=True) for i, p in enumerate(all_params(here))]
    there = row.ours(copies, **row.rich)
    for step in range(3):
        give([there, here], step)
        CUDA.step(there)
        step_here(here)
        assert_alike(there, here)


# --- streams ------------------------------------------------------------------------------------


def test_the_current_stream(row: Row) -> None:
    """A step waits for what its stream does, and on each stream the tables are there in time."""
    pair = there_and_here(CUDA, row, ORDINARY, **row.rich)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for step in range(12):
        with torch.cuda.stream(streams[step % 3]):
            torch.cuda.current_stream().wait_stream(streams[(step - 1) % 3])
            torch.cuda._sleep(1_000_000)
            give(pair, step)
            CUDA.step(pair[0])
        step_here(pair[1])
    torch.cuda.synchronize()
    assert_alike(*pair)


def test_streams_in_no_order(row: Row) -> None:
    """Steps of different parameters, on streams that nobody orders: what they share is in order."""
    pair = there_and_here(CUDA, row, parameters((300_001,), (70_001,)), **row.rich)
    give(pair, 0)
    grads = [[p.grad for p in all_params(optimizer)] for optimizer in pair]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for step in range(8):
        which = step % 2
        for optimizer, own in zip(pair, grads, strict=True):
            for i, p in enumerate(all_params(optimizer)):
                p.grad = own[i] if i == which else None
        with torch.cuda.stream(streams[which]):
            if which == 0:
                torch.cuda._sleep(10_000_000)  # so that the other stream is ahead
            CUDA.step(pair[0])
        step_here(pair[1])
    torch.cuda.synchronize()
    assert_alike(*pair)


def test_skipped_steps_of_every_stream(row: Row) -> None:
    """Who asks on another stream than the step's waits for it all the same."""
    optimizer = row.ours(on_cuda((131,)), **row.rich, skip_nonfinite=True)
    give([optimizer], 0, scale=torch.inf)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        CUDA.step(optimizer)
    assert optimizer.skipped_steps == 1


# --- graphs -------------------------------------------------------------------------------------


def captured(row: Row, steps: int, **options: Any) -> tuple[Optimizer, Optimizer]:
    """Train a captured optimizer and an eager one on the same inputs, lr moving on the device."""
    sides, inputs = [], []
    for _ in range(2):
        torch.manual_seed(1)
        lr = torch.tensor(0.05, device="cuda")
        sides.append(
            row.ours(on_cuda((33, 17), (17,), (5000,)), **{**row.rich, **options, "lr": lr})
        )
        inputs.append([torch.zeros_like(p) for p in all_params(sides[-1])])

    def iterate(side: int) -> None:
        optimizer = sides[side]
        optimizer.zero_grad()
        pairs = zip(all_params(optimizer), inputs[side], strict=True)
        sum((p * x).sum() for p, x in pairs).backward()
        optimizer.step()

    def feed(step: int) -> None:
        for side in range(2):
            torch.manual_seed(step)
            for x in inputs[side]:
                x.copy_(random_grad(x))
            sides[side].param_groups[0]["lr"].mul_(0.99)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch's documentation says: a few eager steps first
        for step in range(3):
            feed(step)
            iterate(0)
            iterate(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    sides[0].zero_grad()
    with torch.cuda.graph(graph):
        iterate(0)
    for step in range(3, 3 + steps):
        feed(step)
        graph.replay()
        iterate(1)
    torch.cuda.synchronize()
    del graph
    return sides[0], sides[1]


def test_replays_are_eager_steps(row: Row) -> None:
    """A hundred of them, lr and step counts moving, bit for bit."""
    graph, eager = captured(row, 100)
    assert_equal(values(graph), values(eager))


@pytest.mark.parametrize("extras", [ONE_PASS, {**ONE_PASS, "clear_grads": "zero"}])
def test_replays_do_all_that_is_around_the_rule(row: Row, extras: dict[str, Any]) -> None:
    graph, eager = captured(row, 50, **extras)
    assert_equal(values(graph), values(eager))
    assert_equal(graph.grad_norm, eager.grad_norm)
    assert [int(o.state_dict()["param_groups"][0]["ema_steps"]) for o in (graph, eager)] == [53] * 2


def test_replays_skip(row: Row) -> None:
    """What is not finite when the graph is replayed."""
    params = on_cuda((33, 17), (9000,))
    optimizer = row.ours(params, **row.rich, **ONE_PASS)
    for p in params:
        p.grad = torch.ones_like(p)
    CUDA.step(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    skipped = 0
    for bad in (True, True, False, True):
        params[1].grad[8999] = float("nan") if bad else 1.0
        before = values(optimizer)
        graph.replay()
        torch.cuda.synchronize()
        if bad:
            assert_equal(values(optimizer), before)
        else:
            assert not torch.equal(before[0][0], params[0].detach())
        skipped += bad
        assert optimizer.skipped_steps == skipped


def test_what_a_graph_cannot_hold(row: Row) -> None:
    """The first average, which copies; and a schedule, which Python code knows."""
    params = on_cuda((33, 17))
    optimizer = row.ours(params, **row.rich)
    params[0].grad = torch.ones_like(params[0])
    CUDA.step(optimizer)
    optimizer.ema_decay = 0.9
    for message in ("Take one step before the capture", "ema_decay is a schedule"):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
            optimizer.step()
        torch.cuda.synchronize()
        CUDA.step(optimizer)
        optimizer.ema_decay = lambda step: 1 / step


def test_capturable_is_accepted(row: Row) -> None:
    if not row.takes("capturable"):
        pytest.skip("stock has no such flag")
    graph, eager = captured(row, 10, capturable=True)
    assert_equal(values(graph), values(eager))
    assert all(s["step"].is_cuda for s in graph.state.values())


def test_a_graph_outlives_other_steps(row: Row) -> None:
    """Its tables are its own: eager steps, with other grads and groups, leave them alone."""
    params = on_cuda((33, 17), (17,))
    optimizer = row.ours(params, **row.rich)
    for p in params:
        p.grad = torch.ones_like(p)
    CUDA.step(optimizer)
    graph = torch.cuda.CUDAGraph()
    kept = [p.grad for p in params]
    with torch.cuda.graph(graph):
        optimizer.step()
    give([optimizer], 1)  # grads elsewhere
    optimizer.add_param_group({"params": on_cuda((131,))})
    give([optimizer], 2)
    for _ in range(3):
        CUDA.step(optimizer)
    torch.manual_seed(1)
    twin = row.ours([Parameter(p.detach().clone()) for p in params], **row.rich)
    twin.load_state_dict({"state": {}, "param_groups": twin.state_dict()["param_groups"]})
    for p, q in zip(params, all_params(twin), strict=True):
        twin.state[q] = copy.deepcopy(optimizer.state[p])
    for q, grad in zip(all_params(twin), kept, strict=True):
        q.grad = grad.clone()
    graph.replay()
    CUDA.step(twin)
    for p, q in zip(params, all_params(twin), strict=True):
        assert_equal(p.detach(), q.detach())


def test_zeros_in_a_graph(row: Row) -> None:
    params = on_cuda(*ORDINARY_SHAPES)
    optimizer = row.ours(params, **row.plain)
    give([optimizer], 1)
    optimizer.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=False)
    for p in params:
        p.grad.fill_(3)
    graph.replay()
    assert not any(p.grad.any() for p in params)


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_more_than_2_31_elements() -> None:
    n = 2**31 + 5
    p = Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = fastsgd.SGD([p], lr=0.5)
    assert _C.step(optimizer)
    assert bool((p == -0.5).all())
    optimizer.zero_grad(set_to_none=False)
    assert not bool(p.grad.any())
