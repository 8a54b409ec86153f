"""An optimizer and its twin, stock's, which follows whatever steps ours takes.

What is right is what stock's single-tensor path has, done the same, which is compared to the last
bit; steps of half types are held to one float64 step, and stock's side then goes on from ours.

What a step does besides stock's (its one-pass extras) stock's side does with torch's chain: it
clips with the norm that ours tells, averages with ``AveragedModel`` and clears with ``zero_grad``.
The averages are kept among its states, which it carries through checkpoints and copies untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cases import HALVES, Row, all_expanded, gapped, shifted, strided
from onepass import (
    INF,
    ClippedStep,
    assert_norm,
    copies,
    extras_of,
    finite,
    step_clipped,
    unit,
)
from oracle import all_params
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import Twins, random_grad

from fastsgd import _optimizer


def has_tensor(value: Any) -> bool:
    """Whether an option is a tensor, or holds one."""
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(map(has_tensor, value))
    )


def is_expanded(grad: Tensor | None) -> bool:
    """Whether elements of a grad share memory."""
    return grad is not None and 0 in grad.stride()


def reversed_order(values: Tensor) -> Tensor:
    """Lay values out with the first dimension the fastest."""
    return strided(tuple(reversed(range(values.dim()))))(values)


# How a grad comes, or does not.
LAID: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": shifted(3),
    "gapped": gapped,
    "transposed": reversed_order,
    "expanded": all_expanded,
    "negated": lambda values: torch._neg_view(-values),
}
WAYS = ("new", "new", "new", "in place", "in place", "kept", "none", "misaligned", "gapped")
WAYS += ("transposed", "expanded", "negated")


def warming(step: int) -> float:
    """Rise with the number of the step; a module's function can be pickled."""
    return min(0.99, (1 + step) / (10 + step))


EXTRAS: dict[str, tuple[Any, ...]] = {
    "max_grad_norm": (None, 0.5, 1.0, 1000.0),
    "norm_type": (2.0, INF),
    "clip_grad_value": (None, 0.1, 1.0),
    "skip_nonfinite": (False, True),
    "ema_decay": (None, 0.5, 0.9, warming),
    "clear_grads": (False, True, "zero"),
}


class Due:
    """The step that ours is about to take: built right before it."""

    def __init__(self, life: Life, scale: float = 1.0) -> None:
        """Look at everything that the step depends on. Grads are ``scale`` times too large."""
        ours = life.twins.ours
        self.extras = dict(life.extras)
        self.params = all_params(ours)
        self.grads = [None if p.grad is None else p.grad / scale for p in self.params]
        self.given = [p.grad for p in self.params]
        self.skips = self.extras["skip_nonfinite"] and not finite(self.grads)
        # Squares of float32 are added in float64, whose roundings show if the norm is one as well.
        dtypes = {grad.dtype for grad in self.grads if grad is not None}
        self.units = 2 if scale == 1 and (len(dtypes) < 2 or torch.float64 not in dtypes) else 64
        self.before = copies(self.params)
        self.exact = None
        if not self.skips and any(p.dtype in HALVES for p in self.params):
            self.exact = ClippedStep(life.optimizer, ours, scale)
        self.in_torch = life.only_torch_takes()
        life.taken.clear()


class Life:
    """Both sides, and what ours is asked to do besides stock's step."""

    optimizer: Row
    taken: list[Tensor]  # what torch's code has stepped in ours' last step
    twins: Any = None  # until it begins

    def begin(
        self, build: Callable[[], list[Tensor]], options: Any, flags: Any, extras: Any
    ) -> None:
        """Make both sides, each of parameters of its own; give grads."""
        self.twins = Twins(self.optimizer, build, **options, **flags)
        self.extras = extras_of(self.twins.ours)
        for name, value in extras:
            self.ask_for(name, value)
        self.skipped = self.averaged = 0
        self.give(["new"])

    # What the sides are asked, and ours is told.

    def ask_for(self, extra: str, value: Any) -> None:
        """Tell ours what to do besides stock's step."""
        setattr(self.twins.ours, extra, value)
        self.extras[extra] = value

    def param(self, which: int, optimizer: Any = None) -> Tensor:
        """Return a parameter by number."""
        found = all_params(optimizer or self.twins.ours)
        return found[which % len(found)]

    @property
    def named_twice(self) -> bool:
        """Whether a parameter stands in the groups twice."""
        found = all_params(self.twins.ours)
        return len(set(found)) < len(found)

    def only_torch_takes(self) -> set[Tensor] | None:
        """Return the parameters that the kernels do not take; None where that is not so clear."""
        ours = self.twins.ours
        found = set()
        for group in ours.param_groups:
            others = [v for k, v in group.items() if k not in ("params", "lr", "weight_decay")]
            if isinstance(group.get("momentum"), bool) or any(map(has_tensor, others)):
                return None
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.dim() == 0 and has_tensor([group["lr"], group["weight_decay"]]):
                    return None
                # Only SGD's states are ever left in another dtype.
                buffer = ours.state.get(p, {}).get("momentum_buffer")
                other = buffer is not None and buffer.dtype != p.dtype and group["momentum"] != 0
                if p.grad.is_neg() or other:
                    found.add(p)
        return None if self.named_twice else found

    # Steps.

    def give(self, ways: Sequence[str]) -> None:
        """Let grads come, the same on both sides; but stock gets plain memory."""
        self.twins.seed += 1

        def give(optimizer: Any) -> None:
            for i, p in enumerate(all_params(optimizer)):
                self.give_one(p, ways[i % len(ways)])

        self.twins.each(give)
        for p, q in self.twins.pairs():
            if p.grad is None:
                continue
            if p.grad.is_neg() or p.grad.stride() != q.grad.stride() or is_expanded(p.grad):
                q.grad = torch.empty_like(p.grad).copy_(p.grad)

    def give_one(self, p: Tensor, way: str) -> None:
        """Give one."""
        values = random_grad(p)
        fits = p.grad is not None and not (p.grad.is_neg() or is_expanded(p.grad))
        if way == "none":
            p.grad = None
        elif way == "kept" and p.grad is not None:
            pass
        elif way == "in place" and fits:
            p.grad.copy_(values)
        elif way in LAID and p.numel():
            p.grad = LAID[way](values)
        else:
            p.grad = values

    def look(self, scale: float = 1.0) -> None:
        """See what ours has to do in the step that comes."""
        self.due = Due(self, scale)

    def follow(self) -> None:
        """Let stock do what ours has done, and compare what only a step has."""
        ours, stock = self.twins.sides
        due = self.due
        measures = due.extras["max_grad_norm"] is not None or due.extras["skip_nonfinite"]
        if measures:
            assert_norm(ours.grad_norm, due.grads, due.extras["norm_type"], due.units)
        self.skipped += due.skips
        if not due.skips:
            for grad, (p, q) in zip(due.given, self.twins.pairs(), strict=True):
                if is_expanded(grad) and p in set(self.taken):
                    q.grad = copy.deepcopy(grad)
            limits = (due.extras["max_grad_norm"], due.extras["clip_grad_value"])
            step_clipped(stock, ours.grad_norm if measures else None, *limits)
            if due.extras["ema_decay"] is not None:
                self.average()
            self.settle_layouts()
            self.settle_halves()
            assert due.in_torch is None or set(self.taken) == due.in_torch, "who has stepped?"
        self.clear()

    def average(self) -> None:
        """Average with torch's own, from the averages before."""
        ours, stock = self.twins.sides
        decay = self.due.extras["ema_decay"]
        decay = decay(self.averaged + 1) if callable(decay) else decay
        known: dict[Tensor, tuple[Tensor, Tensor]] = {}
        for (p, q), before, grad in zip(
            self.twins.pairs(), self.due.before, self.due.grads, strict=True
        ):
            average = stock.state.get(q, {}).get("ema")
            if average is None and grad is not None:
                average = before.to(self.dtype_of_average(p), copy=True)
            if average is not None:
                known[q] = (p, average)
        self.averaged += 1
        if not known:
            return
        old = nn.ParameterList(Parameter(average) for _, average in known.values())
        new = nn.ParameterList(Parameter(p.detach().to(a.dtype)) for p, a in known.values())
        model = AveragedModel(old, multi_avg_fn=get_ema_multi_avg_fn(decay))
        model.n_averaged.fill_(self.averaged - 1)
        model.update_parameters(new)
        for (q, (p, was)), right in zip(known.items(), model.module, strict=True):
            mine = ours.state[p]["ema"]
            assert mine.dtype == was.dtype and not mine.requires_grad
            off = (mine.double() - right.detach().double()).abs()
            bound = unit(mine, was, p.detach()) if self.averaged > 1 else torch.zeros(())
            assert bool(((off <= bound) | ~right.isfinite()).all()), ("the average", mine, right)
            stock.state[q]["ema"] = copy.deepcopy(mine)

    def settle_layouts(self) -> None:
        """Lay stock's states out as ours where stock was given a copy of an expanded grad."""
        ours, stock = self.twins.sides
        for (p, q), grad in zip(self.twins.pairs(), self.due.given, strict=True):
            for name, value in ours.state.get(p, {}).items() if is_expanded(grad) else ():
                if isinstance(value, Tensor) and name in stock.state[q]:
                    stock.state[q][name] = torch.empty_like(value).copy_(stock.state[q][name])

    def settle_halves(self) -> None:
        """Hold them to a float64 step, or to stock's where torch's code has stepped them."""
        ours, stock = self.twins.sides
        if self.due.exact is None:
            return
        in_torch = set(self.taken)
        self.due.exact.others = in_torch
        self.due.exact.check()
        for p, q in self.twins.pairs():
            if p.dtype not in HALVES or p in in_torch:
                continue
            with torch.no_grad():
                q.copy_(p)
            for key, value in ours.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    stock.state[q][key].copy_(value)

    def clear(self) -> None:
        """Clear stock's grads, where ours does."""
        clear = self.extras["clear_grads"]
        if clear:
            self.twins.stock.zero_grad(set_to_none=clear is True)

    def step(self) -> None:
        """Step both."""
        self.look()
        self.twins.ours.step()
        self.follow()

    def equal(self) -> None:
        """Nothing tells the sides apart."""
        self.twins.check()
        assert self.twins.ours.skipped_steps == self.skipped
        assert extras_of(self.twins.ours) == self.extras

    # What ours does besides, and what is saved.

    def extras_on(self) -> Iterator[Any]:
        """Return what ours does besides stock's step."""
        return (self.extras[name] for name in EXTRAS if name != "norm_type")

    def dtype_of_average(self, p: Tensor) -> torch.dtype:
        """Return the dtype in which ours averages a parameter."""
        wide = self.extras["ema_dtype"]
        return wide if wide is not None and p.dtype in HALVES else p.dtype

    def save(self) -> Any:
        """Return checkpoints of model and optimizer, of both sides."""
        saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.twins.sides]
        for group in saved[1]["param_groups"]:  # as one that has loaded one of ours
            group["ema_steps"] = self.averaged
        return {"params": copies(all_params(self.twins.ours)), "sides": saved}

    def load(self, saved: Any, crossed: bool) -> None:
        """Load them, each its own, or the other's."""
        mine, theirs = copy.deepcopy(saved["sides"][:: -1 if crossed else 1])
        ours, stock = self.twins.sides
        for group in theirs["param_groups"]:
            group.update(foreach=False, fused=None)
        ours.load_state_dict(mine)
        stock.load_state_dict(theirs)
        for group in stock.param_groups:
            group.pop("ema_steps", None)
        ids = [i for group in theirs["param_groups"] for i in group["params"]]
        averages = False
        for i, (p, q) in zip(ids, self.twins.pairs(), strict=True):
            average = theirs["state"].get(i, {}).get("ema")
            if average is not None:  # stock has given it the parameter's dtype
                stock.state[q]["ema"] = average.to(self.dtype_of_average(p), copy=True)
                averages = True
        steps = [group.get("ema_steps", 0) for group in mine["param_groups"]]
        self.averaged = max([*steps, 1 if averages else 0])
        for (p, q), value in zip(self.twins.pairs(), saved["params"], strict=True):
            with torch.no_grad():
                p.copy_(value)
                q.copy_(value)


@contextmanager
def recorded(taken: list[Tensor]) -> Iterator[None]:
    """Note what torch's code steps."""
    step_as_stock = _optimizer.step_as_stock

    def step(optimizer: Any, stock_step: Any) -> Any:
        taken.extend(p for p in all_params(optimizer) if p.grad is not None)
        return step_as_stock(optimizer, stock_step)

    _optimizer.step_as_stock = step
    try:
        yield
    finally:
        _optimizer.step_as_stock = step_as_stock
