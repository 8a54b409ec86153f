"""What the extras may be set to, and what keeps them."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import ORDINARY_SHAPES, Row
from onepass import EXTRAS, INF, NAN, Extended, Own, copies, extras_of
from oracle import all_params, assert_equal
from places import emulated, give
from snapshot import Snapshot
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from twins import parameters

BUILD = parameters(*ORDINARY_SHAPES, (257,))

INVALID = r"Invalid decay value .* provided. Please provide a value in \[0,1\] range."
ANY = (TypeError, ValueError)
BAD: tuple[tuple[str, Any, Any], ...] = (
    *[
        (name, v, ValueError)
        for name in ("max_grad_norm", "clip_grad_value")
        for v in (-1, -INF, NAN)
    ],
    *[(name, v, ANY) for name in ("max_grad_norm", "clip_grad_value") for v in ("many", [1.0], 1j)],
    *[("norm_type", v, ValueError) for v in (0, 1, 3.0, -INF, NAN, -2)],
    *[("norm_type", v, ANY) for v in (None, "two", [2.0])],
    *[("ema_decay", v, ValueError) for v in (-0.1, 1.001, 2, INF, NAN)],
    *[("ema_decay", v, ANY) for v in ("much", [0.9], 1j)],
    *[
        ("ema_dtype", v, ValueError)
        for v in (torch.float64, torch.bfloat16, torch.int32, "float32")
    ],
    *[("clear_grads", v, ValueError) for v in ("zeros", "none", "", None, 2, [])],
)
GOOD = {
    "max_grad_norm": 1.5,
    "norm_type": INF,
    "error_if_nonfinite": True,
    "clip_grad_value": 0.5,
    "skip_nonfinite": True,
    "ema_decay": 0.9,
    "ema_dtype": torch.float32,
    "clear_grads": "zero",
}
FULL = {name: value for name, value in GOOD.items() if name != "error_if_nonfinite"}


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=str)
def test_refused(row: Row, name: str, value: Any, error: Any) -> None:
    """By the constructor, and by the attribute, which then keeps its value."""
    words = INVALID if name == "ema_decay" and error is ValueError else None
    with pytest.raises(error, match=words):
        row.ours(BUILD(), **row.rich, **{name: value})
    for extras in ({}, FULL):
        twins = Extended(row, BUILD, extras, **row.rich)
        twins.grads()
        before, snapshot = extras_of(twins.ours), Snapshot(twins.ours)
        with pytest.raises(error, match=words):
            setattr(twins.ours, name, value)
        assert extras_of(twins.ours) == before
        snapshot.assert_unchanged()
        twins.step()
        twins.check()


def test_skipping_and_raising_are_alternatives(row: Row) -> None:
    """Both flags together are refused, in whatever order they come."""
    names = ("skip_nonfinite", "error_if_nonfinite")
    with pytest.raises(ValueError):
        row.ours(BUILD(), **row.rich, **dict.fromkeys(names, True))
    for first, second in (names, names[::-1]):
        optimizer = row.ours(BUILD(), **row.rich, **{first: True})
        with pytest.raises(ValueError):
            setattr(optimizer, second, True)
        assert getattr(optimizer, first) is True and getattr(optimizer, second) is False
        setattr(optimizer, first, False)
        setattr(optimizer, second, True)


@pytest.mark.parametrize("name", EXTRAS)
def test_not_in_a_group(row: Row, name: str) -> None:
    """The extras are the optimizer's: a group that brings one is refused, even the default."""
    for value in (EXTRAS[name], GOOD[name]):
        group = {"params": parameters((5,))(), name: value}
        with pytest.raises(ValueError):
            row.ours([{"params": BUILD()}, group], **row.rich)
        twins = Extended(row, BUILD, {}, **row.rich)
        with pytest.raises(ValueError):
            twins.ours.add_param_group(group)
        assert len(twins.ours.param_groups) == 1
        twins.run(1)


def own(data: Tensor) -> Tensor:
    """Return a parameter that is torch's to step."""
    return data.as_subclass(Own).requires_grad_()


@pytest.mark.parametrize("kind", [Parameter, own], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", EXTRAS)
def test_not_written_into_a_group(row: Row, name: str, kind: Any) -> None:
    """Nor may one be written into a group: the next steps say so, and a checkpoint's load."""

    def build() -> list[dict[str, Any]]:
        return [{"params": BUILD()}, {"params": [kind(torch.randn(70))]}]

    for value in (EXTRAS[name], GOOD[name]):
        twins = Extended(row, build, {}, **row.rich).run(2)
        twins.grads()
        twins.ours.param_groups[1][name] = value
        checkpoint, snapshot = twins.ours.state_dict(), Snapshot(twins.ours)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{name} belongs to the optimizer"):
                twins.ours.step()
        snapshot.assert_unchanged()
        del twins.ours.param_groups[1][name]
        snapshot = Snapshot(twins.ours)
        with pytest.raises(ValueError, match=f"{name} belongs to the optimizer"):
            twins.ours.load_state_dict(checkpoint)
        snapshot.assert_unchanged()
        twins.step()
        twins.check()


@pytest.mark.parametrize("name", EXTRAS)
def test_not_in_the_place_of_a_key(row: Row, name: str) -> None:
    """A group of as many keys as before is looked at all the same."""
    twins = Extended(row, BUILD, {}, **row.rich)
    for optimizer in twins.sides:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # adds a key
    twins.run(2)
    group = twins.ours.param_groups[0]
    lr = group.pop("initial_lr")
    group["".join([*name])] = EXTRAS[name]  # another string of the same letters
    twins.grads()
    snapshot = Snapshot(twins.ours)
    with pytest.raises(ValueError, match=f"{name} belongs to the optimizer"):
        twins.ours.step()
    snapshot.assert_unchanged()
    del group[name]
    group["initial_lr"] = lr
    twins.step()
    twins.check()


@pytest.mark.parametrize("name", [n for n in EXTRAS if n not in ("norm_type", "ema_dtype")])
def test_not_where_steps_are_differentiable(row: Row, name: str) -> None:
    """With ``differentiable`` none can be set."""
    with pytest.raises(ValueError):
        row.ours(BUILD(), **row.plain, differentiable=True, **{name: GOOD[name]})
    optimizer = row.ours(BUILD(), **row.plain, differentiable=True)
    with pytest.raises(ValueError):
        setattr(optimizer, name, GOOD[name])
    assert extras_of(optimizer) == EXTRAS


def test_shown(row: Row) -> None:
    """Printing an optimizer shows what is asked for, and nothing more than torch's does else."""
    params = BUILD()
    optimizer = row.ours(params, **row.rich)
    text = repr(optimizer)
    assert text == repr(row.stock(params, **row.rich))
    for name, value in FULL.items():
        setattr(optimizer, name, value)
    lines = "".join(f"    {name}: {value}\n" for name, value in FULL.items() if name in EXTRAS)
    head, shown = repr(optimizer).split("\nOne pass\n")
    assert head + ")" == text
    assert sorted(shown[:-1].splitlines()) == sorted(lines.splitlines())
    for name, value in EXTRAS.items():
        setattr(optimizer, name, value)
    assert repr(optimizer) == text


def test_by_keyword_only(row: Row) -> None:
    """No positional argument after stock's, and none of them is an option of stock's."""
    options = [value for name, value in row.ours(BUILD(), **row.plain).defaults.items()]
    for count in range(len(options), len(options) + 4):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            row.ours(BUILD(), *options, *[None] * count)
    assert extras_of(row.ours(BUILD(), **row.plain)) == EXTRAS
    assert not EXTRAS.keys() & row.ours(BUILD(), **row.rich, **FULL).param_groups[0].keys()


@pytest.mark.parametrize(
    "extras", [{}, FULL, {"error_if_nonfinite": True}], ids=["none", "full", "error"]
)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_kept_by_copies(row: Row, way: Any, extras: Any) -> None:
    """A copy does what the original does, and neither touches the other's."""
    twins = Extended(row, BUILD, extras, **row.rich)
    twins.run(2)
    other = way(twins.ours)
    assert extras_of(other) == {**EXTRAS, **extras}
    assert other.skipped_steps == 0
    twins.grads()
    for p, q in zip(all_params(twins.ours), all_params(other), strict=True):
        q.grad = p.grad.clone()
    other.step()
    twins.step()
    assert_equal(copies(all_params(other)), copies(all_params(twins.ours)))
    other.max_grad_norm = 99.0
    assert twins.ours.max_grad_norm == {**EXTRAS, **extras}["max_grad_norm"]


@pytest.mark.filterwarnings(
    "error:.*Graph break:UserWarning", "error:.*attempted to call:UserWarning"
)
def test_in_a_compiled_function(row: Row) -> None:
    """It breaks the graph there, and the kernels do what they do without."""
    made = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(33, 17)
        extras = {"max_grad_norm": 0.5, "ema_decay": 0.9, "clear_grads": True}
        optimizer = row.ours(net.parameters(), **row.rich, **extras)

        def train(x: Any, net: Any = net, optimizer: Any = optimizer) -> Any:
            net(x).square().mean().backward()
            optimizer.step()
            return net(x).sum()

        run = torch.compile(train, backend="eager") if compiled else train
        losses = [run(torch.full((5, 33), 0.1 * step)) for step in range(4)]
        params = all_params(optimizer)
        states = [copies(optimizer.state[p].values()) for p in params]
        made.append([losses, copies(params), states, optimizer.grad_norm])
    torch._dynamo.reset()
    assert_equal(*made)


class Wrapper:
    """Holds an optimizer, and takes the place of its class, as the wrappers of Lightning do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Derive from the class of what it holds."""
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (type(self), type(optimizer)), {})

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What it holds."""
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        """Have the rest of it."""
        return getattr(self._optimizer, name)


def test_wrapped(row: Row) -> None:
    """What is asked of a wrapper, or set there, is the optimizer's; in another wrapper too."""
    within = row.ours(BUILD(), **row.rich, max_grad_norm=0.5, ema_decay=0.5, skip_nonfinite=True)
    wrapper: Any = type("Another", (), dict(vars(Wrapper)))(Wrapper(within))
    for value in (1.0, NAN):
        for p in all_params(within):
            p.grad = torch.full_like(p, value)
        within.step()
    assert extras_of(wrapper) == extras_of(within)
    assert wrapper.skipped_steps == 1 and wrapper.grad_norm.isnan()
    wrapper.max_grad_norm = 9.0
    assert within.max_grad_norm == 9.0
    saved = wrapper.state_dict()
    assert saved["param_groups"][0]["ema_steps"] == 1
    averages = copies(state["ema"] for state in within.state.values())
    with wrapper.ema_weights():
        assert_equal([p.detach() for p in within.state], averages)
        with pytest.raises(RuntimeError, match="inside ema_weights"):
            wrapper.state_dict()
    other = row.ours(BUILD(), **row.rich)
    Wrapper(other).load_state_dict(saved)
    assert other.state_dict()["param_groups"][0]["ema_steps"] == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_step_within_a_step(row: Row, there: bool) -> None:
    """A schedule may ask what was found, and step: what that finds is the optimizer's too."""
    seen: list[tuple[int, float | None]] = []

    def schedule(number: int) -> float:
        if len(seen) == number:  # asked before it is known that the step is skipped
            return 0.9
        norm = optimizer.grad_norm
        seen.append((optimizer.skipped_steps, None if norm is None else float(norm)))
        if number == 2:
            p = all_params(optimizer)[0]
            grad, p.grad = p.grad, torch.full_like(p, NAN)
            optimizer.step()
            p.grad = grad
        return 0.9

    extras = {"skip_nonfinite": True, "max_grad_norm": 1.0, "ema_decay": schedule}
    optimizer = row.ours(parameters((257,), (8,))(), **row.plain, **extras)
    norms = []
    for count in range(1, 4):
        give([optimizer], count)
        norms.append(float(get_total_norm([p.grad for p in all_params(optimizer)])))
        with emulated() if there else nullcontext():
            optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(norms[-1])
        assert optimizer.skipped_steps == (count > 1)
    assert [count for count, _ in seen] == [0, 0, 1]
    assert [norm for _, norm in seen] == pytest.approx([None, *norms[:2]])


def test_set_before_the_optimizer_is_made(row: Row) -> None:
    """By a subclass, as it may set any attribute; the constructor's argument comes after it."""

    class Mine(row.ours):
        def __init__(self, params: Any, norm: Any, **options: Any) -> None:
            self.max_grad_norm = norm
            super().__init__(params, **options)

    assert Mine(parameters((3,))(), 0.5, **row.rich).max_grad_norm == 0.5
    assert Mine(parameters((3,))(), 0.5, **row.rich, max_grad_norm=2).max_grad_norm == 2.0
    with pytest.raises(ValueError, match="max_grad_norm"):
        Mine(parameters((3,))(), -1, **row.rich)
    with pytest.raises(ValueError, match="differentiable"):
        Mine(parameters((3,))(), 0.5, **{**row.plain, "differentiable": True})


def test_numbers_of_other_kinds(row: Row) -> None:
    """Whatever says that it is a real number, as numpy's do."""
    optimizer = row.ours(parameters((3,))(), **row.rich, max_grad_norm=Fraction(1, 2))
    optimizer.ema_decay = Fraction(3, 4)
    assert (optimizer.max_grad_norm, optimizer.ema_decay) == (0.5, 0.75)
    assert type(optimizer.max_grad_norm) is type(optimizer.ema_decay) is float


def test_numbers_beyond_floats(row: Row) -> None:
    with pytest.raises(ValueError, match=INVALID):
        row.ours(parameters((3,))(), **row.rich, ema_decay=10**400)


def test_a_shallow_copy_has_its_own(row: Row) -> None:
    """Setting an option of a copy leaves the other's alone."""
    optimizer = row.ours(parameters((3,))(), **row.rich, max_grad_norm=0.5)
    other = copy.copy(optimizer)
    other.max_grad_norm = 2.0
    assert (optimizer.max_grad_norm, other.max_grad_norm) == (0.5, 2.0)
