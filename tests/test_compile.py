"""A step within torch.compile."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from cases import Row, flagged
from oracle import assert_equal, stock_roots
from torch import Tensor, nn
from torch.nn import Parameter
from twins import ORDINARY, Twins, parameters

import fastsgd


@pytest.fixture
def dynamo() -> Any:
    """Compile from a clean slate."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(**flagged())
def test_compiled_step(row: Row, dynamo: Any, backend: str, flags: Any) -> None:
    """A compiled function that calls ``step``: the numbers of stock that is not compiled.

    Where it is, it may compute the scalars of a step in another way, in other precision.
    """
    for options in (row.plain, row.rich):
        twins = Twins(row, ORDINARY, **options, **flags)
        compiled = torch.compile(lambda o=twins.ours: o.step(), backend=backend)
        for _ in range(3):
            twins.grads()
            compiled()
            twins.stock.step()
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())
        assert [g.get("fused") for g in twins.ours.param_groups] == [flags.get("fused")]
        assert [g.get("foreach") for g in twins.ours.param_groups] == [flags.get("foreach")]
        twins.run(2)  # and on without compilation


def test_compiled_step_in_bfloat16(row: Row, dynamo: Any) -> None:
    """With ``fused=True`` every element moves (stock moves none of the whole registers).

    Of the method compiled, and of a function that calls it, which was wrong after the method.
    """
    for way in ("method", "function"):
        p = Parameter(torch.ones(64, dtype=torch.bfloat16))
        p.grad = torch.full_like(p, 2.0)
        optimizer = row.ours([p], **row.plain, **row.fused)
        step = optimizer.step if way == "method" else lambda o=optimizer: o.step()
        torch.compile(step, backend="eager")()
        assert bool((p != 1).all()), way


def test_compiled_training_step(row: Row, dynamo: Any) -> None:
    """Forward, backward, step and zero_grad in one compiled function; stock's is not compiled."""
    finals = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        torch.manual_seed(0)
        net = nn.Linear(33, 17)
        optimizer = cls(net.parameters(), **row.rich, **more)

        def train(x: Tensor, net: Any = net, optimizer: Any = optimizer) -> None:
            loss = net(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        compiled = torch.compile(train, backend="eager") if cls is row.ours else train
        for step in range(4):
            torch.manual_seed(step)
            compiled(torch.randn(5, 33))
        finals.append([p.detach() for p in net.parameters()])
    assert_equal(*finals)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_unwrapped_step_traces_as_one_graph(row: Row, dynamo: Any, backend: str) -> None:
    """``step.__wrapped__.__wrapped__`` traces with ``fullgraph=True``, as stock's does."""
    twins = Twins(row, ORDINARY, **row.rich)
    compiled = []
    for optimizer in twins.sides:
        step = optimizer.step.__wrapped__.__wrapped__

        @torch.compile(backend=backend, fullgraph=True)
        def traced(step: Any = step, optimizer: Any = optimizer) -> None:
            with torch.no_grad():
                step(optimizer)

        compiled.append(traced)
    for _ in range(3):
        twins.grads()
        for traced in compiled:
            with stock_roots():  # dynamo knows torch's own functions
                traced()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


def test_wrapped_steps_run_eagerly_too(row: Row) -> None:
    """The unwrapped functions step when called."""
    twins = Twins(row, ORDINARY, **row.rich)
    for unwrap in (lambda s: s.__wrapped__, lambda s: s.__wrapped__.__wrapped__):
        twins.grads()
        for optimizer in twins.sides:
            with torch.no_grad():
                unwrap(type(optimizer).step)(optimizer)
        twins.check()


@pytest.mark.slow
def test_inductor(row: Row, dynamo: Any) -> None:
    """The default backend."""
    if os.system("c++ --version > /dev/null") != 0:
        pytest.skip("no compiler")
    twins = Twins(row, parameters((33, 17), (70,)), **row.rich)
    compiled = [torch.compile(lambda o=o: o.step()) for o in twins.sides]
    for _ in range(3):
        twins.grads()
        for step in compiled:
            step()
        for p, q in twins.pairs():
            torch.testing.assert_close(p.detach(), q.detach())


def test_compiled_clipping(dynamo: Any) -> None:
    """``clip_grad_norm_`` is torch's own there, without a break in the graph."""
    params = parameters((33,), (5, 7))()
    for p in params:
        p.grad = torch.randn_like(p)
    expected = [p.grad.clone() for p in params]
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected]))

    @torch.compile(backend="eager", fullgraph=True)
    def clip() -> Tensor:
        return fastsgd.clip_grad_norm_(params, 0.5)

    torch.testing.assert_close(clip(), norm)
    for p, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, grad * 0.5 / norm)
