"""What PyTorch asks of an optimizer class: construction, closures, subclasses."""

from __future__ import annotations

import ast
import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from cases import Row, label
from oracle import all_params, assert_equal
from torch import Tensor, nn
from torch.nn import Parameter
from twins import ORDINARY, Twins, stepped

import fastsgd
from fastsgd import _C
from fastsgd._extras import EXTRAS, OnePass

# The class.


def test_is_a_subclass_of_stock(row: Row) -> None:
    """``isinstance`` holds, the signature and the name are stock's."""
    assert issubclass(row.ours, row.stock)
    assert row.ours.__name__ == row.stock.__name__ == row.name
    mine, theirs = (inspect.signature(cls).parameters for cls in (row.ours, row.stock))
    for (name, own), (other, stock) in zip(mine.items(), theirs.items(), strict=False):
        assert (name, own.kind, own.default) == (other, stock.kind, stock.default)
    for extra in list(mine.values())[len(theirs) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY
    assert len(mine) >= len(theirs)
    for method in ("step", "zero_grad"):
        ours = list(inspect.signature(getattr(row.ours, method)).parameters)
        assert ours == list(inspect.signature(getattr(row.stock, method)).parameters)
    assert row.ours.__doc__
    assert row.ours.__module__.split(".")[0] == "fastsgd"


def test_signature_for_type_checkers(row: Row) -> None:
    """What a type checker sees of the constructor is what it takes."""
    source = inspect.getsource(inspect.getmodule(row.ours))  # type: ignore[arg-type]
    (written,) = (
        part
        for cls in ast.parse(source).body
        if isinstance(cls, ast.ClassDef) and cls.name == row.name
        for part in ast.walk(cls)
        if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    )
    made: dict[str, Any] = {}
    text = "from __future__ import annotations\n" + ast.unparse(written)
    exec(compile(text, row.name, "exec"), made)  # noqa: S102
    *mine, one_pass = inspect.signature(made["__init__"]).parameters.values()
    theirs = inspect.signature(row.stock.__init__).parameters.values()
    assert [(p.name, p.kind, p.default) for p in mine] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert one_pass.kind is inspect.Parameter.VAR_KEYWORD
    assert one_pass.annotation == "Unpack[OnePass]"
    assert [*OnePass.__annotations__] == [*EXTRAS]


def test_package_names() -> None:
    """The package exports what it promises."""
    assert isinstance(fastsgd.__version__, str)
    assert isinstance(fastsgd.cuda_available(), bool)


def test_defaults_and_repr(row: Row) -> None:
    """The defaults, ``repr`` and options of each group are stock's."""
    mine, theirs = row.ours(ORDINARY()), row.stock(ORDINARY())
    assert mine.defaults == theirs.defaults
    assert repr(mine) == repr(theirs)
    assert mine.param_groups[0].keys() == theirs.param_groups[0].keys()


def test_bad_options(row: Row) -> None:
    """What stock refuses is refused with its exception and words."""
    for options in row.bad:
        with pytest.raises(Exception) as theirs:  # noqa: PT011, B017
            row.stock(ORDINARY(), **options)
        with pytest.raises(theirs.type) as mine:
            row.ours(ORDINARY(), **options)
        assert str(mine.value) == str(theirs.value), label(options)


def test_bad_parameters(row: Row) -> None:
    """A tensor alone, nothing, no tensor, a set, a non-leaf, a duplicate over groups."""
    leaf = torch.randn(3, requires_grad=True)
    shared = Parameter(torch.randn(3))
    for bad in (
        leaf,
        [],
        [3.0],
        [{"params": {leaf}}],
        [leaf * 2],
        [{"params": [shared]}, {"params": [shared]}],
        [{"params": shared, "lr": 0.1}, {"lr": 0.1}],
        [("a", leaf), shared],
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011, B017
            row.stock(bad)
        with pytest.raises(theirs.type) as mine:
            row.ours(bad)
        assert str(mine.value) == str(theirs.value)


def test_retained_grad_and_views(row: Row) -> None:
    """Non-leaves that retain their grad, and leaves that are views, as in stock."""

    def build() -> list[Tensor]:
        base = torch.randn(40, 3)
        retained = torch.randn(9, requires_grad=True) * 2
        retained.retain_grad()
        view = base[:, 1].detach().requires_grad_()
        if torch.__version__ >= "2.15":  # which lets no such view be written twice
            return [retained, view]
        with torch.no_grad():
            inner = Parameter(torch.randn(5, 5))[1:].requires_grad_()
        return [retained, view, inner]

    twins = Twins(row, build, **row.rich)
    for _ in range(3):
        for optimizer in twins.sides:
            for p in all_params(optimizer):
                p.grad = torch.full_like(p, 0.3)
        twins.step()
        for p, q in twins.pairs():
            assert_equal(p.detach(), q.detach())


def test_frozen_parameter_with_a_grad(row: Row) -> None:
    """``requires_grad`` does not matter, ``grad`` does."""
    twins = Twins(row, ORDINARY, **row.rich).run(1)
    for optimizer in twins.sides:
        for p in all_params(optimizer)[::2]:
            p.requires_grad_(False)
    twins.run(1)
    for optimizer in twins.sides:
        for p in all_params(optimizer)[::2]:
            p.grad = None
    twins.step()
    twins.check()
    for optimizer in twins.sides:
        for p in all_params(optimizer):
            p.requires_grad_(True)
    twins.run(1)


# Closures, return values, grad mode.


def test_closure(row: Row) -> None:
    """The closure runs once, with grad enabled, before the step, and its value is returned."""
    for mode in (True, False):
        twins = Twins(row, ORDINARY, **row.rich)
        calls: list[bool] = []
        for optimizer in twins.sides:

            def closure(optimizer: Any = optimizer, calls: list[bool] = calls) -> Tensor:
                calls.append(torch.is_grad_enabled())
                optimizer.zero_grad()
                loss = sum((p * p).sum() for p in all_params(optimizer))
                loss.backward()
                return loss

            with torch.set_grad_enabled(mode):
                positional = optimizer.step(closure)
                assert torch.is_grad_enabled() is mode
                named = optimizer.step(closure=closure)
            assert isinstance(positional, Tensor) and isinstance(named, Tensor)
            assert positional.requires_grad
        assert calls == [True] * 4
        twins.check()


def test_closure_may_change_anything(row: Row) -> None:
    """Options, grads and the list of parameters that a closure changes count in the same step."""
    twins = Twins(row, ORDINARY, **row.rich)
    twins.grads()
    for optimizer in twins.sides:

        def closure(optimizer: Any = optimizer) -> float:
            group = optimizer.param_groups[0]
            group["lr"] = 0.5
            group["params"][0].grad = None
            extra = Parameter(torch.ones(70))
            extra.grad = torch.full((70,), 0.25)
            optimizer.add_param_group({"params": [extra]})
            return 1.5

        assert optimizer.step(closure) == 1.5
    twins.check()


def test_returns_none_without_a_closure(row: Row) -> None:
    """``step()``, ``step(None)`` and the unbound call."""
    twins = Twins(row, ORDINARY, **row.rich)
    twins.grads()
    for optimizer in twins.sides:
        assert optimizer.step() is None
        assert optimizer.step(None) is None
        assert optimizer.step(closure=None) is None
        assert type(optimizer).step(optimizer) is None
    twins.check()


def test_wrong_arguments(row: Row) -> None:
    """Calls that stock refuses are refused, and do nothing."""
    optimizer = row.ours(ORDINARY(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(all_params(optimizer))
    for args, kwargs in (((None, None), {}), ((), {"clozure": None}), ((None,), {"closure": None})):
        with pytest.raises(TypeError):
            optimizer.step(*args, **kwargs)
    with pytest.raises(TypeError):
        optimizer.step(3)
    with pytest.raises(TypeError):
        optimizer.zero_grad(1, 2)
    with pytest.raises((TypeError, ValueError)):
        type(optimizer).step()
    assert_equal(all_params(optimizer), before)


def test_closure_that_raises(row: Row) -> None:
    """The exception comes through, nothing moved, grad mode is as it was."""
    optimizer = stepped(row)
    before = copy.deepcopy([p.detach() for p in all_params(optimizer)])

    def closure() -> float:
        raise KeyError("mine")

    with torch.no_grad():
        with pytest.raises(KeyError, match="mine"):
            optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert_equal([p.detach() for p in all_params(optimizer)], before)


def test_step_inside_other_modes(row: Row) -> None:
    """Under no_grad and inference_mode normal parameters are stepped as usual."""
    twins = Twins(row, ORDINARY, **row.rich).run(1)
    twins.grads()
    with torch.no_grad():
        twins.step()
    with torch.inference_mode():
        twins.step()
    twins.check()
    twins.run(1)


def test_grad_that_requires_grad(row: Row) -> None:
    """After ``backward(create_graph=True)`` the step records nothing."""
    twins = Twins(row, ORDINARY, **row.rich)
    for _ in range(2):
        for optimizer in twins.sides:
            optimizer.zero_grad()
            loss = sum((p**3).sum() for p in all_params(optimizer))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss.backward(create_graph=True)
            optimizer.step()
            for p in all_params(optimizer):
                assert p.is_leaf and p.grad.requires_grad
        twins.check()
        for optimizer in twins.sides:
            optimizer.zero_grad()


def test_step_from_a_hook_of_backward(row: Row) -> None:
    """An optimizer a parameter, stepping and clearing from backward itself."""
    finals = []
    for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 1))
        optimizers = {p: cls([p], **row.rich, **more) for p in net.parameters()}

        def update(p: Tensor, optimizers: Any = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(4):
            net(torch.ones(3, 5)).sum().backward()
            assert all(p.grad is None for p in net.parameters())
        finals.append([p.detach() for p in net.parameters()])
    assert_equal(*finals)


# Subclasses.


def test_subclass_that_adds_options(row: Row) -> None:
    """Own entries of defaults, groups and states are kept and do not disturb."""

    def derive(base: type) -> type:
        class Derived(base):
            def __init__(self, params: Any, extra: float = 0.0, **options: Any) -> None:
                super().__init__(params, **options)
                self.extra = extra
                for group in self.param_groups:
                    group["extra"] = extra

            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                for group in self.param_groups:
                    for p in group["params"]:
                        self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
                        with torch.no_grad():
                            p.mul_(1 - group["extra"])
                return loss

        return Derived

    derived = row.derived(derive)
    for options in (row.plain, row.rich):
        twins = Twins(derived, ORDINARY, extra=0.01, **options).run(3)
        assert all(s["seen"] == 3 for s in twins.ours.state.values())
        again = derived.ours(ORDINARY(), **options)
        again.load_state_dict(twins.ours.state_dict())
        assert again.param_groups[0]["extra"] == 0.01


def test_a_closure_that_is_none(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if none were given, which is how wrappers call, and takes the same short way."""
    params = ORDINARY()
    optimizer = row.ours(params, **row.plain)
    for p in params:
        p.grad = torch.ones_like(p)
    monkeypatch.setattr(_C, "step_or_route", None)
    before = [p.detach().clone() for p in params]
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None
    assert any(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
    with pytest.raises(TypeError):
        optimizer.step(None, None)
    with pytest.raises(TypeError):
        optimizer.step(other=None)
