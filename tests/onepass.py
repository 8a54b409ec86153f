"""What is right of the extras: total norms, clipped grads, averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from cases import DTYPES, HALVES, Row
from oracle import Float64Step, all_params, assert_equal, one_thread
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import Build, Twins, check_state, parameters

INF, NAN = float("inf"), float("nan")
Decay = float | Callable[[int], float]

# What an optimizer takes after stock's arguments, and what each is if nothing is said.
EXTRAS = {
    "max_grad_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "clip_grad_value": None,
    "skip_nonfinite": False,
    "ema_decay": None,
    "ema_dtype": None,
    "clear_grads": False,
}


class Own(Tensor):
    """A class that the kernels do not know."""


def extras_of(optimizer: Any) -> dict[str, Any]:
    """Return what an optimizer says of its extras."""
    return {name: getattr(optimizer, name) for name in EXTRAS}


def with_extras(row: Row, **extras: Any) -> Row:
    """Return the row with the class under test told to do these."""
    return replace(row, ours=partial(row.ours, **extras))


def all_dtypes(*shapes: Sequence[int], dtypes: Iterable[torch.dtype] = DTYPES) -> Build:
    """Return a build with every shape in every dtype, dtypes alternating."""
    return lambda: [p for s in shapes for t in dtypes for p in parameters(s, dtype=t)()]


def numbers(grad: Tensor) -> Tensor:
    """Return the numbers that a norm is of, in float64; those of a complex grad are real pairs."""
    grad = grad.detach()
    grad = grad.coalesce().values() if grad.is_sparse else grad
    if grad.is_complex():
        return torch.view_as_real(grad.resolve_conj()).double().view(-1, 2)
    return grad.double().flatten()


def true_norm(grads: Iterable[Tensor | None], norm_type: float = 2.0) -> float:
    """Return the norm of all grads as near as float64 can tell, without overflow on the way."""
    found = [numbers(g) for g in grads if g is not None]
    if any(bool(x.isnan().any()) for x in found):
        return NAN
    if norm_type == INF:
        sizes = [x.abs() if x.dim() == 1 else torch.hypot(*x.unbind(1)) for x in found]
        return max((s.max().item() for s in sizes if s.numel()), default=0.0)
    return math.hypot(*torch.cat([torch.zeros(1).double(), *(x.flatten() for x in found)]).tolist())


def assert_norm(
    norm: Any, grads: Sequence[Tensor | None], norm_type: float = 2.0, units: int = 2
) -> None:
    """A norm that an optimizer tells is within ``units`` of the truth, and in the right dtype."""
    wide = any(g is not None and g.dtype in (torch.float64, torch.complex128) for g in grads)
    assert isinstance(norm, Tensor) and norm.shape == () and not norm.requires_grad
    assert norm.dtype == (torch.float64 if wide else torch.float32), norm.dtype
    right = torch.tensor(true_norm(grads, norm_type), dtype=torch.float64).to(norm.dtype)
    if not right.isfinite():
        assert_equal(norm, right)
        return
    bits = torch.int64 if wide else torch.int32
    assert abs(norm.view(bits).item() - right.view(bits).item()) <= units, (norm, right)


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return what ``torch.nn.utils.clip_grad_norm_`` multiplies by."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def clip_(grad: Tensor, norm: Tensor | None, max_norm: float | None, value: float | None) -> Tensor:
    """Return the grad as a step takes it: in place where that can be, so laid out as it is."""
    if grad.is_sparse:
        return grad if max_norm is None else grad * coefficient(norm, max_norm)
    if grad.is_neg() or grad.is_conj() or (0 in grad.stride() and grad.numel() > 1):
        grad = grad.resolve_conj().resolve_neg().contiguous().clone()
    with torch.no_grad():
        if max_norm is not None:
            # torch multiplies one number without dimensions by another in the wider dtype.
            flat = grad.view(1) if grad.dim() == 0 else grad
            flat.mul_(coefficient(norm, max_norm))
        if value is not None:
            grad.clamp_(-value, value)
    return grad


def finite(grads: Iterable[Tensor | None]) -> bool:
    """Whether no grad has an infinity or NaN in it."""
    return all(bool(numbers(g).isfinite().all()) for g in grads if g is not None)


def copies(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return copies, laid out alike."""
    return [None if t is None else t.detach().clone() for t in tensors]


def step_clipped(
    stock: torch.optim.Optimizer, norm: Tensor | None, max_norm: float | None, value: float | None
) -> None:
    """Step stock as torch's chain does, clipping first, and leave the grads as they were."""
    clips = max_norm is not None or value is not None
    params = [q for q in all_params(stock) if q.grad is not None] if clips else []
    given = [(q.grad, q.grad.detach().clone()) for q in params]
    with one_thread():
        for q in params:
            q.grad = clip_(q.grad, norm, max_norm, value)
        stock.step()
    for q, (grad, values) in zip(params, given, strict=True):
        if q.grad is grad and not grad.is_sparse:
            grad.detach().copy_(values)
        q.grad = grad


class Extended(Twins):
    """Ours with extras, and stock with grads that were clipped before the step.

    Half parameters are not compared: see ``ClippedStep``.
    """

    # A device that skips a parameter's first step has made its states, as nobody waits for it.
    may_have_states = False

    def __init__(self, row: Row, build: Build, extras: dict[str, Any], **options: Any) -> None:
        """Build both sides."""
        super().__init__(with_extras(row, **extras), build, **options)

    def step(self) -> None:
        """Step both, unless ours is to skip; look at the norm, and at what is left in the grads."""
        ours, extras = self.ours, extras_of(self.ours)
        held = [p.grad for p in all_params(ours)]
        before = copies(held)
        skipped = ours.skipped_steps
        ours.step()
        if extras["clear_grads"] is False:
            assert_equal([p.grad for p in all_params(ours)], before)
        counts = ("max_grad_norm", "skip_nonfinite", "error_if_nonfinite")
        if any(extras[name] is not None and extras[name] is not False for name in counts):
            assert_norm(ours.grad_norm, before, extras["norm_type"])
        skip = extras["skip_nonfinite"] and not finite(before)
        assert ours.skipped_steps == skipped + skip
        if skip:
            return
        clip = (ours.grad_norm, extras["max_grad_norm"], extras["clip_grad_value"])
        step_clipped(self.stock, *clip)

    def check(self) -> None:
        """Parameters and states that are stock's too are equal, and no group has a new key."""
        for p, q in self.pairs():
            if p.dtype not in HALVES:
                assert_equal(p.detach(), q.detach())
                own = {k: v for k, v in self.ours.state.get(p, {}).items() if k != "ema"}
                others = self.stock.state.get(q, {})
                if others or not self.may_have_states:
                    check_state(own, others)
        for group, other in zip(self.ours.param_groups, self.stock.param_groups, strict=True):
            assert group.keys() == other.keys()


class ClippedStep(Float64Step):
    """The step in float64 with grads that are clipped in float64 too. Averages are left out."""

    def __init__(self, row: Row, optimizer: Any, scale: float = 1.0) -> None:
        """Step as the optimizer is about to, its grads divided by ``scale``."""
        super().__init__(row.stock, optimizer)
        extras = extras_of(optimizer)
        limit, value = extras["max_grad_norm"], extras["clip_grad_value"]
        grads = [None if p.grad is None else p.grad.double() / scale for p, _ in self.inputs]
        self.norm = true_norm(grads, extras["norm_type"])
        dtype = torch.float64 if any(p.dtype == torch.float64 for p, _ in self.inputs) else None
        norm = torch.tensor(self.norm, dtype=dtype or torch.float32)
        for (_, own), grad in zip(self.inputs, grads, strict=True):
            own.pop("ema", None)
            if grad is not None:
                own["grad"] = clip_(grad, norm.double(), limit, value)
        self.exact, twins = self.step()
        self.twins = [(p, q) for (p, _), q in zip(self.inputs, twins, strict=True)]

    def _results(self, exact: Any, twins: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Take the averages out of sight of what compares all states."""
        with_averages = self.optimizer
        states = {
            p: {k: v for k, v in own.items() if k != "ema"}
            for p, own in with_averages.state.items()
        }
        self.optimizer = SimpleNamespace(state=states)
        try:
            yield from super()._results(exact, twins)
        finally:
            self.optimizer = with_averages


def unit(*tensors: Tensor) -> Tensor:
    """Return the distance of neighbouring numbers of the first's dtype, at the largest size."""
    size = torch.stack([t.double().abs() for t in tensors]).amax(0)
    info = torch.finfo(tensors[0].dtype)
    return info.eps * torch.exp2(torch.frexp(size.clamp(min=info.tiny)).exponent.double() - 1)


class Averages:
    """``AveragedModel`` beside an optimizer that averages.

    Each step is compared from the averages that the optimizer had before it, so that every one of
    them must be right to a unit. Before the first step the model holds the parameters as they are.
    """

    def __init__(self, optimizer: Any, decay: Decay, dtype: torch.dtype | None = None) -> None:
        """Copy the parameters, where halves are averaged in ``dtype`` in that."""
        self.optimizer = optimizer
        made = []
        for p in all_params(optimizer):
            wide = dtype if dtype is not None and p.dtype in HALVES else p.dtype
            made.append(Parameter(p.detach().as_subclass(Tensor).to(wide, copy=True)))
        self.seen = [False] * len(made)
        self.values = nn.ParameterList(made)

        def average(averages: Any, values: Any, number: Tensor) -> None:
            rate = decay(int(number) + 1) if callable(decay) else decay
            get_ema_multi_avg_fn(rate)(averages, values, number)

        self.model = AveragedModel(self.values, multi_avg_fn=average)

    def watch(self) -> None:
        """See which parameters have a grad: to be called before the step."""
        params = all_params(self.optimizer)
        self.seen = [seen or p.grad is not None for seen, p in zip(self.seen, params, strict=True)]

    def check(self) -> None:
        """Average what the step has made of the parameters, and compare."""
        averages = list(self.model.module.parameters())
        old = copies(averages)
        first = not self.model.n_averaged
        params = all_params(self.optimizer)
        with torch.no_grad():
            for p, value in zip(params, self.values, strict=True):
                value.copy_(p)
        self.model.update_parameters(self.values)
        for i, (p, average, was) in enumerate(zip(params, averages, old, strict=True)):
            mine = self.optimizer.state.get(p, {}).get("ema")
            assert mine is not None or not self.seen[i], "a parameter has no average"
            if mine is None:
                continue
            assert mine.dtype == average.dtype and mine.shape == p.shape
            assert not mine.requires_grad
            off = (mine.double() - average.detach().double()).abs()
            assert bool((off <= (0 if first else unit(mine, was, p.detach()))).all()), off.max()
            average.data.copy_(mine)
