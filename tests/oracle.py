"""What is right.

For float32 and float64 the right answer is stock's single-tensor path (``foreach=False``), to the
last bit. Half types compute in float and round once on store, which stock does not do, so for them
the right answer is one step in float64 from the same state, rounded once, to one unit in the last
place. Stock's ``fused=True`` on the CPU is never an oracle: it is wrong in places.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the oracle on one thread, whatever ours runs on: it is right on any, and sooner."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of every group, in order, each entry as often as it stands there."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that matter: those of dimensions with more than one element."""
    if tensor.numel() == 0:
        return ()
    return tuple(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def _ordered(x: Tensor) -> Tensor:
    """Map a half tensor to integers: neighbouring numbers differ by one, -0 and 0 by none."""
    bits = x.contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def ulp_distance(x: Tensor, y: Tensor) -> Tensor:
    """How many representable numbers lie between two tensors of one half dtype, elementwise."""
    assert x.dtype == y.dtype and x.dtype in HALVES, (x.dtype, y.dtype)
    distance = (_ordered(x) - _ordered(y)).abs()
    return torch.where(x.isnan() & y.isnan(), 0, distance)


def assert_near(actual: Tensor, exact: Tensor, inputs: tuple[Tensor, ...] = ()) -> None:
    """Assert that a half tensor is within one unit of a float64 result rounded once.

    Single precision cannot do better than its own rounding where the operands cancel, so
    an element whose result is thousands of times smaller than the ``inputs`` it was made of may
    also be off by a few float32 roundings of those inputs.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    actual, exact = actual.detach(), exact.detach()
    off = ulp_distance(actual, exact.to(actual.dtype)) > 1
    if not off.any():
        return
    scale = torch.zeros_like(exact)
    for x in inputs:
        scale = torch.maximum(scale, x.detach().double().abs())
    off &= ~((actual.double() - exact).abs() <= scale * 2.0**-22)
    if off.any():
        at = tuple(off.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(off.sum())} of {off.numel()} {actual.dtype} elements are more than one unit from"
            f" the float64 result; the first, at {at}: {actual[at].item()!r}, should be"
            f" {exact[at].item()!r}"
        )


class Float64Step:
    """The step that an optimizer is about to make, made by stock in float64 from the same state.

    Build it before the step, ``check`` after it. Parameters must not share memory.
    """

    def __init__(self, stock: type, optimizer: torch.optim.Optimizer) -> None:
        """Copy everything to float64 and let stock step."""
        groups = []
        self.twins: list[tuple[Tensor, Tensor, tuple[Tensor, ...]]] = []
        state: dict[Tensor, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            members = []
            for p in group["params"]:
                q = p.detach().double().clone().requires_grad_()
                q.grad = None if p.grad is None else p.grad.detach().double().clone()
                own = optimizer.state.get(p, {})
                state[q] = {
                    k: copy.deepcopy(v) if k == "step" else _double(v) for k, v in own.items()
                }
                before = [p.detach().clone(), *(v.clone() for v in _floating(own.values()))]
                if p.grad is not None:
                    before.append(p.grad.detach().clone())
                self.twins.append((p, q, tuple(b for b in before if b.shape == p.shape)))
                members.append(q)
            options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            options.update(foreach=False, fused=False)
            groups.append({"params": members, **options})
        lr = groups[0]["lr"]
        self.exact = stock(groups, lr=lr, foreach=False)
        for q, own in state.items():
            if own:
                self.exact.state[q] = own
        self.optimizer = optimizer
        self.exact.step()

    def check(self) -> None:
        """Compare every half parameter and half state with the float64 step."""
        for p, q, before in self.twins:
            if p.dtype in HALVES:
                assert_near(p, q, before)
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dtype in HALVES:
                    assert_near(value, self.exact.state[q][key], before)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double().clone()
    return copy.deepcopy(value)


def _floating(values: Any) -> Iterator[Tensor]:
    return (v for v in values if isinstance(v, Tensor) and v.is_floating_point())
