"""A step under a mode, a default device or a transform, and of tensors without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Row
from oracle import all_params, assert_equal
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from twins import ORDINARY, Twins, parameters

import fastsgd
from fastsgd import _C


def test_meta(row: Row) -> None:
    """Parameters on the meta device step to nothing, and get states on meta."""
    p = Parameter(torch.empty(33, 5, device="meta"))
    real = Parameter(torch.ones(70))
    p.grad, real.grad = torch.empty(33, 5, device="meta"), torch.ones(70)
    optimizer = row.ours([p, real], **row.rich)
    optimizer.step()
    optimizer.step()
    for name in row.states:
        assert optimizer.state[p][name].is_meta
        assert not optimizer.state[real][name].is_meta
    assert not torch.equal(real, torch.ones(70))


NORMS: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9}


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_norms_on_meta(row: Row, norm_type: float) -> None:
    """They are on meta too; but those of gradients elsewhere are not known then, and an error."""
    p, real = Parameter(torch.empty(33, 5, device="meta")), Parameter(torch.ones(70))
    p.grad, real.grad = torch.empty(33, 5, device="meta"), torch.ones(70)
    assert fastsgd.clip_grad_norm_([p], 1.0, norm_type).is_meta
    optimizer = row.ours([p], **row.rich, **NORMS, norm_type=norm_type)
    optimizer.step()
    optimizer.step()
    assert optimizer.grad_norm is not None and optimizer.grad_norm.is_meta
    assert optimizer.state[p]["ema"].is_meta and optimizer.skipped_steps == 0
    optimizer.add_param_group({"params": [real]})
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    assert torch.equal(real, torch.ones(70))


@pytest.mark.parametrize("extras", [{}, NORMS], ids=["plain", "norms"])
def test_fake_tensors(row: Row, extras: dict[str, Any]) -> None:
    """Under FakeTensorMode nothing real is read or written."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        net = nn.Linear(33, 5)
        optimizer = row.ours(net.parameters(), **row.rich, **extras)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(3, 33)).sum().backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for name in row.states:
        assert isinstance(optimizer.state[net.weight][name], FakeTensor)


def test_fake_parameters_outside_of_their_mode(row: Row) -> None:
    """Fake parameters stepped after the mode was left."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        p = Parameter(torch.empty(70))
        p.grad = torch.empty(70)
    optimizer = row.ours([p], **row.rich)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[p][row.states[0]].fake_mode is mode


class Counting(TorchDispatchMode):
    """Count operators."""

    def __init__(self) -> None:
        """Start at none."""
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_under_a_dispatch_mode(row: Row) -> None:
    """A user's mode around the step does not change the result."""
    twins = Twins(row, ORDINARY, **row.rich)
    for _ in range(3):
        twins.grads()
        with Counting():
            twins.step()
        twins.check()


class Logging(TorchFunctionMode):
    """Note what is called."""

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and go on."""
        self.calls.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_under_a_function_mode(row: Row) -> None:
    """A user's mode sees the operators of a step, as with stock."""
    twins = Twins(row, parameters((131,), (70,)), **row.rich)
    for _ in range(2):
        twins.grads()
        modes = Logging(), Logging()
        for mode, optimizer in zip(modes, twins.sides, strict=True):
            with mode:
                optimizer.step()
        twins.check()
        mine, theirs = (
            [c for c in mode.calls if c.endswith("_") and not c.startswith("_")] for mode in modes
        )
        assert mine == theirs and theirs


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_under_a_default_device(row: Row, device: str) -> None:
    """A default device, whichever, changes nothing: the kernels step."""
    twins = Twins(row, parameters((131,), (70,)), **row.rich)
    if device != "cpu":  # where torch would make the counters
        twins.run(1)
    torch.set_default_device(device)
    try:
        for _ in range(2):
            with torch.device("cpu"):
                twins.grads()
            twins.stock.step()
            assert _C.step(twins.ours)
            before = [p.grad.clone() for p in all_params(twins.ours)]
            norm = fastsgd.clip_grad_norm_(all_params(twins.ours), 0.5)
            assert norm.is_cpu and not torch.equal(
                before[0], twins.ours.param_groups[0]["params"][0].grad
            )
            for p, grad in zip(all_params(twins.ours), before, strict=True):
                p.grad.copy_(grad)
    finally:
        torch.set_default_device(None)
    twins.check()


def test_states_under_another_default_device(row: Row) -> None:
    """Counters that torch makes there it makes itself, or fails to."""

    def outcome(optimizer: Any) -> Any:
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError) as refused:
            return type(refused)
        return [p.detach().clone() for p in all_params(optimizer)]

    twins = Twins(row, parameters((131,)), **row.rich)
    twins.grads()
    with torch.device("meta"):
        mine, theirs = map(outcome, twins.sides)
    assert mine == theirs if isinstance(theirs, type) else not assert_equal(mine, theirs)
    for p, q in twins.pairs():
        counts = [o.state[x].get("step") for o, x in zip(twins.sides, (p, q), strict=True)]
        if isinstance(counts[1], Tensor):
            assert counts[0].device == counts[1].device
    for p, q in twins.pairs():
        counts = [o.state[x].get("step") for o, x in zip(twins.sides, (p, q), strict=True)]
        if isinstance(counts[1], Tensor):
            assert counts[0].device == counts[1].device


def test_inside_a_transform(row: Row) -> None:
    """Within torch.func stock's code runs, and refuses or does what it does."""

    def outcome(optimizer: Any) -> Any:
        def loss(x: Tensor) -> Tensor:
            optimizer.step()
            return x.sum()

        try:
            torch.func.grad(loss)(torch.ones(3))
        except RuntimeError as refused:
            return str(refused)
        return [p.detach().clone() for p in all_params(optimizer)]

    twins = Twins(row, parameters((131,)), **row.rich)
    twins.grads()
    mine, theirs = (outcome(optimizer) for optimizer in twins.sides)
    assert mine == theirs if isinstance(theirs, str) else not assert_equal(mine, theirs)
