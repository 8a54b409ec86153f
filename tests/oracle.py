"""What is right.

For float32 and float64 the right answer is stock's single-tensor path (``foreach=False``), to the
last bit, with the nearest number for every square root (``exact_roots``). Half types compute in
float and round once on store, which stock does not do, so for them the right answer is one step in
float64 from the same state, rounded once, to one unit in the last place. Stock's ``fused=True`` on
the CPU is never an oracle: it is wrong in places.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    import numpy
except ImportError:
    numpy = None

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

HALVES = (torch.float16, torch.bfloat16)


# As torch has them. The second works in place.
ROOT, ROOT_ = Tensor.sqrt, Tensor.sqrt_


def exact_root(x: Tensor) -> Tensor:
    """Return the nearest numbers to the square roots, laid out as torch lays them out."""
    root = torch.empty_like(x)
    with numpy.errstate(invalid="ignore"):
        numpy.sqrt(x.numpy(), out=root.numpy())
    return root


def _has_exact_root(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    ordinary = x.device.type == "cpu" and x.layout is torch.strided and not x.requires_grad
    return ordinary and x.dtype in (torch.float32, torch.float64) and not x.is_neg()


def _root(x: Tensor) -> Tensor:
    return exact_root(x) if _has_exact_root(x) else ROOT(x)


def _root_(x: Tensor) -> Tensor:
    return x.copy_(exact_root(x)) if _has_exact_root(x) else ROOT_(x)


@contextmanager
def roots(**methods: Any) -> Iterator[None]:
    """Let ``Tensor`` have these methods of its own, before those that it inherits."""
    was = {name: vars(Tensor).get(name) for name in ("sqrt", "sqrt_")}

    def set_to(methods: dict[str, Any]) -> None:
        for name in was:
            if methods.get(name) is not None:
                setattr(Tensor, name, methods[name])
            elif name in vars(Tensor):
                delattr(Tensor, name)

    set_to(methods)
    try:
        yield
    finally:
        set_to(was)


def exact_roots() -> Any:
    """Give stock's optimizers correctly rounded square roots.

    IEEE 754 wants the nearest number, and processors compute it; so do the kernels. Torch calls a
    library for whole tensors, whose float32 roots are off by one unit here and there (one in seven
    on one machine, none on another), so what it computes depends on the machine, and is further
    from the truth. With that one operation mended, all bits of stock's steps can be asked for. That
    nothing else is mended with it is the business of ``test_parity``, which also looks at stock as
    it is.
    """
    return roots(sqrt=_root, sqrt_=_root_) if numpy is not None else roots()


def stock_roots() -> Any:
    """Give stock's optimizers the square roots that they come with."""
    return roots()


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


def near(actual: Tensor, exact: Tensor) -> Tensor:
    """Return which elements of a half tensor are within one unit of a float64 result."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    return ulp_distance(actual.detach(), exact.detach().to(actual.dtype)) <= 1


# Single precision rounds an operand, a scalar or a result by 2^-24 of it; a rule has up to a dozen.
ROUNDINGS = 2.0**-24 * 12


class Float64Step:
    """The step that an optimizer is about to make, made by stock in float64 from the same state.

    Build it before the step, ``check`` after it. Parameters must not share memory.

    Right is what is within one unit of the float64 result rounded once. Single precision cannot
    always do that: where operands cancel (a parameter and its update, an average and the gradient,
    the two averages of a centered variance) its own roundings are larger than the half type's. So
    an element may also be off by what a dozen roundings of an input would do to it, added up over
    the inputs. That is measured: each input in turn is changed by that much, and the step repeated.
    """

    def __init__(self, stock: type, optimizer: torch.optim.Optimizer) -> None:
        """Copy everything, and let stock step in float64."""
        self.stock, self.optimizer = stock, optimizer
        self.others: set[Tensor] = set()  # parameters that are stepped in another way
        self.defaults = copy.deepcopy(optimizer.defaults)
        self.groups = []
        self.inputs = []
        for group in optimizer.param_groups:
            options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for flag in ("foreach", "fused", "capturable"):
                options[flag] = False
            self.groups.append((options, group["params"]))
            for p in group["params"]:
                known = optimizer.state.get(p) or _filled(optimizer, p)
                own = {k: _copy(v) for k, v in known.items()}
                self.inputs.append((p, {"param": _copy(p), "grad": _copy(p.grad), **own}))
        self.exact, twins = self.step()
        self.twins = [(p, q) for (p, _), q in zip(self.inputs, twins, strict=True)]

    def step(self, changed: str | None = None) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """Step copies in float64; also with all inputs of one name ``changed`` by a little."""
        twins, state = [], {}
        for _, own in self.inputs:
            own = {
                k: v if k == "step" else _double(v, 1 + ROUNDINGS if k == changed else 1)
                for k, v in copy.deepcopy(own).items()
            }
            q = own.pop("param").requires_grad_()
            q.grad = own.pop("grad")
            twins.append(q)
            state[q] = own
        members = iter(twins)
        groups = [
            {"params": [next(members) for _ in ps], **copy.deepcopy(o)} for o, ps in self.groups
        ]
        exact = self.stock(groups, lr=0.1, foreach=False)
        exact.defaults.update(self.defaults)
        exact.state.clear()
        exact.state.update({q: own for q, own in state.items() if own})
        exact.step()
        return exact, twins

    def check(self) -> None:
        """Compare every half parameter and half state with the float64 step."""
        results = list(self._results(self.exact, [q for _, q in self.twins]))
        wrong = [~near(actual, exact) for actual, exact in results]
        if not any(bool(off.any()) for off in wrong):
            return
        allowed = [torch.zeros_like(exact) for _, exact in results]
        for name in {name for _, own in self.inputs for name in own} - {"step"}:
            changed = self._results(*self.step(name))
            for bound, (_, exact), (_, other) in zip(allowed, results, changed, strict=True):
                bound += (other - exact).abs()
        for (actual, exact), off, bound in zip(results, wrong, allowed, strict=True):
            off &= ~((actual.double() - exact).abs() <= bound)
            if off.any():
                at = tuple(off.nonzero()[0].tolist())
                raise AssertionError(
                    f"{int(off.sum())} of {off.numel()} {actual.dtype} elements are more than one"
                    f" unit from the float64 result; the first, at {at}: {actual[at].item()!r},"
                    f" should be {exact[at].item()!r}, give or take {bound[at].item()!r}"
                )

    def _results(
        self, exact: torch.optim.Optimizer, twins: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for (p, _), q in zip(self.inputs, twins, strict=True):
            if p in self.others:
                continue
            if p.dtype in HALVES:
                yield p.detach(), q.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dtype in HALVES and key != "step":
                    yield value, exact.state[q][key]


def _filled(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return a state that is filled with a number when it is made, and so rounds the number."""
    fill = optimizer.defaults.get("initial_accumulator_value")
    if fill is None:
        return {}
    return {"step": torch.zeros(()), "sum": torch.full_like(p.detach(), fill)}


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _double(value: Any, factor: float) -> Any:
    return value.double() * factor if isinstance(value, Tensor) else value
