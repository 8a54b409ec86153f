"""What PyTorch asks of an optimizer class, and what users do between steps."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import json
import pickle
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, ORDINARY_SHAPES, Row, flagged, label
from oracle import Float64Step, all_params, assert_equal
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from twins import Twins, fresh_states, parameters

import fastsgd
from fastsgd import _C

BUILD = parameters(*ORDINARY_SHAPES)


def stepped(row: Row, **options: Any) -> torch.optim.Optimizer:
    """Return our optimizer after one step."""
    optimizer = row.ours(BUILD(), **(options or row.rich))
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


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


def test_package_names() -> None:
    """The package exports what it promises."""
    assert isinstance(fastsgd.__version__, str)
    assert isinstance(fastsgd.cuda_available(), bool)


def test_defaults_and_repr(row: Row) -> None:
    """The defaults, ``repr`` and options of each group are stock's."""
    mine, theirs = row.ours(BUILD()), row.stock(BUILD())
    assert mine.defaults == theirs.defaults
    assert repr(mine) == repr(theirs)
    assert mine.param_groups[0].keys() == theirs.param_groups[0].keys()


def test_bad_options(row: Row) -> None:
    """What stock refuses is refused with its exception and words."""
    for options in row.bad:
        with pytest.raises(Exception) as theirs:  # noqa: PT011, B017
            row.stock(BUILD(), **options)
        with pytest.raises(theirs.type) as mine:
            row.ours(BUILD(), **options)
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
    twins = Twins(row, BUILD, **row.rich).run(1)
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
        twins = Twins(row, BUILD, **row.rich)
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
    twins = Twins(row, BUILD, **row.rich)
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
    twins = Twins(row, BUILD, **row.rich)
    twins.grads()
    for optimizer in twins.sides:
        assert optimizer.step() is None
        assert optimizer.step(None) is None
        assert optimizer.step(closure=None) is None
        assert type(optimizer).step(optimizer) is None
    twins.check()


def test_wrong_arguments(row: Row) -> None:
    """Calls that stock refuses are refused, and do nothing."""
    optimizer = row.ours(BUILD(), **row.rich)
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
    twins = Twins(row, BUILD, **row.rich).run(1)
    twins.grads()
    with torch.no_grad():
        twins.step()
    with torch.inference_mode():
        twins.step()
    twins.check()
    twins.run(1)


def test_grad_that_requires_grad(row: Row) -> None:
    """After ``backward(create_graph=True)`` the step records nothing."""
    twins = Twins(row, BUILD, **row.rich)
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


# Hooks and profiling.


def hook_events(optimizer: torch.optim.Optimizer, act: Callable[[], Any]) -> list[Any]:
    """Return what hooks of every kind saw during ``act``: who was called, with which arguments."""
    events: list[Any] = []
    first = all_params(optimizer)[0]

    def note(name: str) -> Callable[..., None]:
        def hook(who: Any, args: Any, kwargs: Any) -> None:
            assert who is optimizer
            shown = tuple("self" if a is optimizer else a for a in args)
            events.append((name, shown, dict(kwargs), first.detach().flatten()[0].item()))

        return hook

    handles = [
        optimizer.register_step_post_hook(note("own post")),
        optimizer.register_step_pre_hook(note("own pre")),
        optimizer.register_step_pre_hook(note("own pre, second")),
        register_optimizer_step_post_hook(note("global post")),
        register_optimizer_step_pre_hook(note("global pre")),
    ]
    try:
        act()
    finally:
        for handle in handles:
            handle.remove()
    return events


def test_hooks_run_once_in_order(row: Row) -> None:
    """Global before own, own before global; the arguments as they were passed; once."""
    twins = Twins(row, BUILD, **row.rich)

    def closure() -> float:
        return 2.0

    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
        ((), {}),
        ((closure,), {}),
        ((), {"closure": closure}),
        ((None,), {}),
        ((), {"closure": None}),
    )
    for args, kwargs in calls:
        twins.grads()
        mine, theirs = (
            hook_events(o, lambda o=o: o.step(*args, **kwargs))  # noqa: B023
            for o in twins.sides
        )
        assert mine == theirs
        assert [e[0] for e in mine] == [
            "global pre",
            "own pre",
            "own pre, second",
            "own post",
            "global post",
        ]
        assert mine[0][3] != mine[-1][3], "the step came between"
    assert hook_events(twins.ours, lambda: None) == []


def test_hooks_in_another_dictionary(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """The globals that hold hooks may be bound anew; what is no dictionary is stock's to refuse."""
    import torch.optim.optimizer as module

    called = []
    twins = Twins(row, BUILD, **row.rich).run(1)
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, {0: lambda *_, name=name: called.append(name)})
            twins.grads()
            twins.ours.step()
            twins.stock.step()
    assert called == [n for n in dict.fromkeys(called) for _ in range(2)] and len(called) == 4
    twins.ours._optimizer_step_pre_hooks = []
    with pytest.raises(AttributeError):
        twins.ours.step()


@pytest.mark.parametrize("kind", ["own pre", "own post", "global pre", "global post"])
def test_each_kind_of_hook_alone(row: Row, kind: str) -> None:
    """One hook of one kind is enough to be called, and may come and go."""
    optimizer = stepped(row)
    register = {
        "own pre": optimizer.register_step_pre_hook,
        "own post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    calls: list[Any] = []
    for _ in range(2):
        handle = register(lambda who, *_: calls.append(who))
        try:
            optimizer.step()
        finally:
            handle.remove()
        optimizer.step()
    assert calls == [optimizer] * 2


def test_hooks_run_once_in_fallback(row: Row) -> None:
    """Also where stock does the work: sparse grads, ``differentiable``, complex parameters."""

    def sparse(o: torch.optim.Optimizer) -> None:
        p = all_params(o)[0]
        p.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 17), p.shape)

    def dense(o: torch.optim.Optimizer) -> None:
        for p in all_params(o):
            p.grad = torch.ones_like(p)

    cases: list[tuple[Any, dict[str, Any], Any]] = [
        *((BUILD, dict(options), sparse) for options in row.sparse[:1]),
        (lambda: [torch.randn(5)], {**row.rich, "differentiable": True}, dense),
        (parameters((5,), dtype=torch.complex64), dict(row.rich), dense),
    ]
    for build, options, give in cases:
        optimizer = row.ours(build(), **options)
        give(optimizer)

        def act(optimizer: Any = optimizer) -> None:
            with torch.no_grad():
                optimizer.step()

        names = [e[0] for e in hook_events(optimizer, act)]
        assert names == ["global pre", "own pre", "own pre, second", "own post", "global post"]


def test_pre_hook_may_change_arguments(row: Row) -> None:
    """A pair that a pre-hook returns becomes the arguments, of the post hooks too."""
    outcomes = []
    for optimizer in Twins(row, BUILD, **row.rich).sides:
        seen: list[Any] = []

        def swap(who: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return (who, lambda: 7.0), {}

        def late(who: Any, args: Any, kwargs: Any, seen: Any = seen) -> None:
            seen.append((len(args), kwargs))

        optimizer.register_step_pre_hook(swap)
        optimizer.register_step_post_hook(late)
        outcomes.append((optimizer.step(), optimizer.step(lambda: 1.0), seen))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == 7.0


@pytest.mark.parametrize("result", [3, (1, 2, 3), [(), {}], "no"], ids=repr)
def test_pre_hook_that_returns_nonsense(row: Row, result: Any) -> None:
    """Stock's error; nothing moved."""
    optimizer = row.ours(BUILD(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    before = copy.deepcopy([p.detach() for p in all_params(optimizer)])
    optimizer.register_step_pre_hook(lambda *_: result)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()
    assert_equal([p.detach() for p in all_params(optimizer)], before)


def test_hooks_may_change_the_step(row: Row) -> None:
    """A pre-hook may edit grads and options, and the step sees it; hooks may remove themselves."""
    twins = Twins(row, BUILD, **row.rich)
    for optimizer in twins.sides:
        handles: list[Any] = []

        def edit(who: Any, args: Any, kwargs: Any, handles: Any = handles) -> None:
            for p in all_params(who):
                p.grad = p.grad * 0.5
            who.param_groups[0]["lr"] *= 0.5
            if who.param_groups[0]["lr"] < 0.03:
                handles[0].remove()

        handles.append(optimizer.register_step_pre_hook(edit))
    twins.run(4)


def test_hook_that_raises(row: Row) -> None:
    """A pre-hook's exception stops the step before it wrote."""
    optimizer = stepped(row)
    before = copy.deepcopy([p.detach() for p in all_params(optimizer)])

    def hook(*_: Any) -> None:
        raise ZeroDivisionError

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert_equal([p.detach() for p in all_params(optimizer)], before)


def test_no_hooks_after_unpickling(row: Row) -> None:
    """Hooks are not part of the pickled state, as in stock."""
    optimizer = stepped(row)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook was copied"))
    copy.deepcopy(optimizer).step()


def record_names(act: Callable[[], Any]) -> list[str]:
    """Return the names of the profiler's records of optimizers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        act()
    return [e.name for e in profile.events() if e.name.startswith("Optimizer.")]


def test_profiler_records(row: Row) -> None:
    """Each step and each zero_grad has its record, once, with the class's name."""
    optimizer = stepped(row)
    step, zero = (
        f"Optimizer.step#{row.name}.step",
        f"Optimizer.zero_grad#{row.name}.zero_grad",
    )
    assert record_names(optimizer.step) == [step]
    assert record_names(lambda: optimizer.zero_grad(set_to_none=False)) == [zero]
    assert record_names(optimizer.zero_grad) == [zero]

    class Named(row.ours):
        pass

    named = Named(BUILD(), **row.rich)
    assert record_names(named.step) == ["Optimizer.step#Named.step"]
    assert record_names(named.zero_grad) == ["Optimizer.zero_grad#Named.zero_grad"]

    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert [e.name for e in profile.function_events].count(step) == 1


def test_execution_trace_observer(row: Row, tmp_path: Path) -> None:
    """The observer that does not set the Python flag sees the records too."""
    optimizer = stepped(row)
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    optimizer.step()
    optimizer.zero_grad()
    observer.stop()
    observer.unregister_callback()
    nodes = [n["name"] for n in json.loads((tmp_path / "trace.json").read_text())["nodes"]]
    assert nodes.count(f"Optimizer.step#{row.name}.step") == 1
    assert nodes.count(f"Optimizer.zero_grad#{row.name}.zero_grad") == 1


def test_optimizer_step_code_is_called_under_a_profiler(row: Row) -> None:
    """The method that Python tracers look for runs once a step."""
    calls: list[Any] = []

    class Traced(row.ours):
        def _optimizer_step_code(self) -> None:
            calls.append(self)

    optimizer = Traced(BUILD(), **row.rich)
    record_names(optimizer.step)
    assert calls == [optimizer]


# Subclasses.


def test_subclass_that_overrides_step(row: Row) -> None:
    """``super().step`` does the work; the override's own code runs too."""

    def derive(base: type) -> type:
        class Derived(base):
            """Halves the grads, counts, and steps."""

            count = 0

            def step(self, closure: Any = None) -> Any:
                for p in all_params(self):
                    if p.grad is not None:
                        p.grad.mul_(0.5)
                self.count += 1
                return super().step(closure)

        return Derived

    twins = Twins(row.derived(derive), BUILD, **row.rich).run(3)
    assert twins.ours.count == twins.stock.count == 3
    events = hook_events(twins.ours, twins.ours.step)
    assert len(events) in (5, 10), "stock runs hooks for the subclass's step and for the base's"


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
        twins = Twins(derived, BUILD, extra=0.01, **options).run(3)
        assert all(s["seen"] == 3 for s in twins.ours.state.values())
        again = derived.ours(BUILD(), **options)
        again.load_state_dict(twins.ours.state_dict())
        assert again.param_groups[0]["extra"] == 0.01


# Checkpoints and copies.


def exchange(twins: Twins) -> None:
    """Give ours stock's checkpoint and stock ours."""
    mine, theirs = (copy.deepcopy(o.state_dict()) for o in twins.sides)
    for group in mine["param_groups"]:
        group.update(foreach=False, fused=None)
    twins.ours.load_state_dict(theirs)
    twins.stock.load_state_dict(mine)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("rich", [False, True])
def test_checkpoints_go_both_ways_at_any_step(row: Row, rich: bool, dtype: torch.dtype) -> None:
    """Exchange after 0, 1, 2, ... steps; both go on with equal bits."""
    build = parameters(*ORDINARY_SHAPES, dtype=dtype)
    twins = Twins(row, build, **(row.rich if rich else row.plain))
    for _ in range(5):
        exchange(twins)
        twins.run(1)


def test_state_dicts_are_equal(row: Row) -> None:
    """The same keys in the same order, the same values."""
    twins = Twins(row, BUILD, **row.rich, **row.fused).run(2)
    mine, theirs = (o.state_dict() for o in twins.sides)
    assert list(mine) == list(theirs) == ["state", "param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in mine["state"].items():
        assert list(state) == list(theirs["state"][key])
        assert all(type(v) is Tensor for v in state.values())
    for group, other in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert list(group) == list(other)
        assert group["params"] == other["params"]


MODES: tuple[dict[str, Any], ...] = (
    {"fused": True},
    {"foreach": True},
    {"foreach": False},
    {"capturable": True},
    {"capturable": True, "foreach": True},
)


@pytest.mark.parametrize(**flagged(*MODES))
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_loads_checkpoints_of_every_mode(row: Row, flags: Any, dtype: torch.dtype) -> None:
    """A checkpoint that carries stock's flags steps right here (stock would turn fused)."""
    defaults = row.stock(BUILD()).defaults
    off = {k: defaults[k] for k in ("foreach", "fused", "capturable") if k in defaults}
    build = parameters(*ORDINARY_SHAPES, dtype=dtype)
    twins = Twins(row, build, **row.rich).run(1)
    saved = copy.deepcopy(twins.stock.state_dict())
    for group in saved["param_groups"]:
        group.update({**off, **flags})
    for fresh in (False, True):
        if fresh:
            params = all_params(twins.ours)
            twins.ours = row.ours(params, **row.plain)
        twins.ours.load_state_dict(copy.deepcopy(saved))
        twins.stock.load_state_dict(copy.deepcopy(twins.stock.state_dict()))
        for group in twins.ours.param_groups:
            assert {k: group[k] for k in flags} == flags
            group.update(off if fresh else {})
        twins.run(2)
        saved = copy.deepcopy(twins.stock.state_dict())
        for group in saved["param_groups"]:
            group.update({**off, **flags})


def test_loads_an_old_checkpoint(row: Row) -> None:
    """Groups without the newer keys, states that are None or empty, steps that are numbers."""
    twins = Twins(row, BUILD, **row.rich).run(2)
    saved = copy.deepcopy(twins.stock.state_dict())
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "differentiable", "fused", "capturable"):
            group.pop(key, None)
        group.pop("decoupled_weight_decay", None)
    if row.counts:
        for state in saved["state"].values():
            state["step"] = int(state["step"])
    else:
        saved["state"][0] = dict.fromkeys(row.states)
        saved["state"][1] = {}
    for optimizer in twins.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.run(3)


def test_loads_a_state_of_another_dtype(row: Row) -> None:
    """The loader casts states to the parameter's dtype, as stock's does."""
    twins = Twins(row, parameters(*ORDINARY_SHAPES, dtype=torch.float64), **row.rich).run(2)
    saved = copy.deepcopy(twins.stock.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = value.half()
    for optimizer in twins.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.run(2)


def test_refuses_checkpoints_that_do_not_fit(row: Row) -> None:
    """Stock's errors."""
    optimizer = stepped(row)
    other = row.stock(BUILD()[:-1], **row.rich).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other)
    other["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other)


def test_state_dict_hooks(row: Row) -> None:
    """Hooks of saving and loading run."""
    optimizer = stepped(row)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("post"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "load pre", "load post"]


def test_named_parameters(row: Row) -> None:
    """``param_names`` goes through checkpoints."""
    twins = Twins(row, lambda: list(nn.Linear(7, 9).named_parameters()), **row.rich).run(2)
    assert twins.ours.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    exchange(twins)
    twins.run(2)


def test_torch_save_and_load(row: Row) -> None:
    """A checkpoint survives ``torch.save`` and ``torch.load(weights_only=True)``."""
    twins = Twins(row, BUILD, **row.rich).run(2)
    for optimizer in twins.sides:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        optimizer.load_state_dict(loaded)
    twins.run(2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_go_on(row: Row, how: str, steps: int) -> None:
    """A copy with its parameters is independent and steps with the same bits."""
    twins = Twins(row, BUILD, **row.rich).run(steps)
    before = copy.deepcopy([p.detach() for p in all_params(twins.ours)])
    if how == "deepcopy":
        clone = copy.deepcopy(twins.ours)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(twins.ours))
    else:
        file = io.BytesIO()
        torch.save(twins.ours, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    assert type(clone) is type(twins.ours)
    assert clone.defaults == twins.ours.defaults
    original, twins.ours = twins.ours, clone
    twins.run(3)
    assert_equal([p.detach() for p in all_params(original)], before)
    assert not set(map(id, clone.state)) & set(map(id, original.state))


def test_model_and_optimizer_copied_together(row: Row) -> None:
    """A deepcopy of both keeps them tied."""
    net = nn.Linear(9, 9)
    optimizer = row.ours(net.parameters(), **row.rich)
    net(torch.ones(9)).sum().backward()
    optimizer.step()
    other, other_optimizer = copy.deepcopy((net, optimizer))
    assert all_params(other_optimizer)[0] is other.weight
    before = other.weight.detach().clone()
    other(torch.ones(9)).sum().backward()
    other_optimizer.step()
    assert not torch.equal(other.weight, before)


def test_getstate_is_stocks(row: Row) -> None:
    """Nothing of ours is pickled."""
    assert stepped(row).__getstate__().keys() == {"defaults", "state", "param_groups"}


def test_distributed_checkpoint_helpers(row: Row) -> None:
    """The helpers that make states by a step with lr 0 and zero grads."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = nn.Linear(7, 9)
    start = copy.deepcopy(net.state_dict())
    optimizer = row.ours(net.parameters(), **row.rich)
    empty = get_optimizer_state_dict(net, optimizer)
    assert_equal(net.state_dict(), start)
    assert all(p.grad is None for p in net.parameters())
    net(torch.ones(7)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    set_optimizer_state_dict(net, optimizer, empty)
    set_optimizer_state_dict(net, optimizer, saved)
    for name in row.states:
        assert_equal(optimizer.state[net.weight][name], saved["state"]["weight"][name])


# Learning rate schedulers.

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.3, anneal_epochs=3),
}


def test_every_scheduler_has_a_row() -> None:
    """A scheduler that torch adds is missed here."""
    assert set(lr_scheduler.__all__) - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(row: Row, name: str, tensor_lr: bool) -> None:
    """Every scheduler drives both alike, warns of nothing, and notices a missing step."""
    options = {**row.rich, **({"lr": torch.tensor(0.1)} if tensor_lr else {})}
    build = parameters(*ORDINARY_SHAPES)
    try:
        SCHEDULERS[name](row.stock(build(), foreach=False, **copy.deepcopy(options)))
    except Exception as refused:  # noqa: BLE001
        pytest.skip(f"stock refuses this scheduler with a tensor lr: {refused}")
    twins = Twins(row, build, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [SCHEDULERS[name](optimizer) for optimizer in twins.sides]
        rates = []
        for step in range(6):
            twins.run(1)
            for scheduler in schedulers:
                scheduler.step(*([1.0 + step] if name == "ReduceLROnPlateau" else []))
            rates.append(float(twins.ours.param_groups[0]["lr"]))
    assert len(set(rates)) > 1, "the schedule did nothing"


def test_scheduler_warns_of_a_missing_step(row: Row) -> None:
    """The scheduler sees that the optimizer did not step."""
    optimizer = row.ours(BUILD(), **row.rich)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_scheduler_on_a_copy(row: Row) -> None:
    """An optimizer with a scheduler can be copied, and a new scheduler put on the copy."""
    optimizer = stepped(row)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step()
    scheduler.step()
    clone = copy.deepcopy(optimizer)
    again = lr_scheduler.ExponentialLR(clone, 0.9)
    clone.step()
    again.step()
    assert clone.param_groups[0]["lr"] == pytest.approx(0.07 * 0.9 * 0.9)


# What users change between steps.


def test_options_edited_at_any_time(row: Row) -> None:
    """Each option of each group, changed by hand, counts from the next step."""

    def build() -> list[dict[str, Any]]:
        return [{"params": BUILD()}, {"params": BUILD()}]

    twins = Twins(row, build, **(row.rich if row.counts else row.plain)).run(1)
    for edit in row.edits:
        for optimizer in twins.sides:
            flags = {k: v for k, v in edit.items() if k not in ("foreach", "fused")}
            optimizer.param_groups[1].update(edit if optimizer is twins.ours else flags)
        twins.run(2)


def test_numpy_scalars_as_options(row: Row) -> None:
    """Options may be numpy numbers."""
    numpy = pytest.importorskip("numpy")
    twins = Twins(row, BUILD, **row.rich)
    for optimizer in twins.sides:
        for key, value in row.rich.items():
            if isinstance(value, float):
                optimizer.param_groups[0][key] = numpy.float64(value * 0.7)
    twins.run(2)


def test_late_and_vanishing_grads(row: Row) -> None:
    """Parameters without a grad are left alone and have no state until they get one."""
    twins = Twins(row, parameters((5,), (70,), (3, 3), ()), **row.rich)
    present = ([0], [0, 2], [], [1, 2, 3], [3], [0, 1, 2, 3], [1])
    for chosen in present:
        twins.grads()
        for optimizer in twins.sides:
            for i, p in enumerate(all_params(optimizer)):
                if i not in chosen:
                    p.grad = None
        untouched = [p.detach().clone() for p in all_params(twins.ours)]
        twins.step()
        twins.check()
        for i, p in enumerate(all_params(twins.ours)):
            assert torch.equal(p.detach(), untouched[i]) == (i not in chosen)


def test_no_grads_at_all(row: Row) -> None:
    """A step without grads does nothing and makes no state."""
    twins = Twins(row, BUILD, **row.rich)
    twins.step()
    twins.check()
    assert bool(twins.ours.state) == row.eager


def test_add_param_group(row: Row) -> None:
    """Groups added between steps, with options of their own, defaults filled in."""
    twins = Twins(row, BUILD, **row.plain).run(2)
    for options in (row.rich, {}, {"lr": torch.tensor(0.3)}):

        def add(optimizer: Any, options: Any = options) -> None:
            optimizer.add_param_group({"params": BUILD(), **copy.deepcopy(options)})

        twins.each(add)
        twins.run(2)
    twins.each(lambda o: o.add_param_group({"params": Parameter(torch.randn(5))}))
    twins.run(1)


def test_data_swapped(row: Row) -> None:
    """``p.data`` may be other memory at every step; the old memory is let go and left alone."""
    twins = Twins(row, parameters((1000,), (33, 17)), **row.rich).run(2)
    for _ in range(3):
        old = [p.data for p in all_params(twins.ours)]
        kept = [t.clone() for t in old]

        def swap(optimizer: Any) -> None:
            for p in all_params(optimizer):
                p.data = torch.randn_like(p)

        twins.each(swap)
        twins.run(1)
        assert_equal(old, kept)


def test_data_swapped_for_another_size(row: Row) -> None:
    """A parameter that grew, with a new state."""
    twins = Twins(row, parameters((1000,), (33,)), **row.rich).run(2)

    def grow(optimizer: Any) -> None:
        p = all_params(optimizer)[0]
        p.data = torch.randn(70, 70)
        p.grad = None
        del optimizer.state[p]

    twins.each(grow)
    twins.run(2)


def test_set_in_place(row: Row) -> None:
    """``p.data.set_``, ``resize_`` and ``copy_`` move memory under the optimizer."""
    twins = Twins(row, parameters((100,), (33,)), **row.rich).run(2)

    def move(optimizer: Any) -> None:
        p, q = all_params(optimizer)
        with torch.no_grad():
            p.set_(torch.randn(130)[7:107])
            q.data.copy_(torch.randn(33))
        p.grad = None

    twins.each(move)
    twins.run(2)


def test_state_edited(row: Row) -> None:
    """States assigned, deleted, emptied, set to None, shared or cleared between steps."""
    twins = Twins(row, parameters((5,), (70,), (3, 3), (9,)), **row.rich).run(2)
    name = row.states[0]

    def assign(o: Any) -> None:
        o.state[all_params(o)[0]][name] = torch.rand(5)

    def delete(o: Any) -> None:
        del o.state[all_params(o)[1]]

    def none(o: Any) -> None:
        o.state[all_params(o)[2]][name] = None

    def empty(o: Any) -> None:
        o.state[all_params(o)[3]] = {}

    def extra(o: Any) -> None:
        for p in all_params(o):
            o.state[p]["mine"] = "text"

    def ordered(o: Any) -> None:
        p = all_params(o)[1]
        o.state[p] = OrderedDict(o.state[p])

    def in_place(o: Any) -> None:
        for p in all_params(o):
            o.state[p][name].mul_(0.5)

    def stranger(o: Any) -> None:
        o.state["note"] = {"any": 1}
        o.state[torch.randn(3)] = {name: torch.randn(3)}

    def clear(o: Any) -> None:
        o.state.clear()

    def replace(o: Any) -> None:
        o.state = type(o.state)(dict, {p: fresh_states(row, p) for p in all_params(o)})

    edits = [assign, delete, extra, ordered, in_place, clear, replace, empty]
    if not row.counts:
        edits.append(none)
    for edit in [*edits, stranger]:
        twins.each(edit)
        twins.grads()
        twins.step()
        if edit is stranger:
            for p, q in twins.pairs():
                assert_equal(p.detach(), q.detach())
        else:
            twins.check()


def test_states_keep_their_tensors(row: Row) -> None:
    """A step writes states in place; their tensors stay the same objects, as in stock."""
    optimizer = stepped(row)
    held = {p: dict(state) for p, state in optimizer.state.items()}
    optimizer.step()
    for p, state in held.items():
        for key, value in state.items():
            assert optimizer.state[p][key] is value


def test_params_list_edited(row: Row) -> None:
    """Append, insert, remove, reorder, replace, with a tuple too."""
    twins = Twins(row, parameters((5,), (70,), (3, 3)), **row.rich).run(2)

    def act(edit: Callable[[dict[str, Any]], Any]) -> None:
        twins.each(lambda o: edit(o.param_groups[0]))
        twins.run(2)

    act(lambda g: g["params"].append(Parameter(torch.randn(17))))
    act(lambda g: g["params"].insert(0, Parameter(torch.randn(2, 2))))
    act(lambda g: g["params"].reverse())
    act(lambda g: g.update(params=tuple(g["params"])))
    act(lambda g: g.update(params=list(g["params"][1:])))
    act(lambda g: g.update(params={"a": g["params"][0], "b": g["params"][1]}.values()))
    act(lambda g: g.update(params=[]))
    act(lambda g: g.update(params=[Parameter(torch.randn(9))]))


def test_groups_edited(row: Row) -> None:
    """``param_groups`` edited and replaced."""

    def build() -> list[dict[str, Any]]:
        return [{"params": BUILD(), "lr": 0.1 * (k + 1)} for k in range(3)]

    twins = Twins(row, build, **row.rich).run(1)
    twins.each(lambda o: o.param_groups.reverse())
    twins.run(1)
    twins.each(lambda o: o.param_groups.pop(1))
    twins.run(1)
    twins.each(lambda o: setattr(o, "param_groups", [dict(g) for g in o.param_groups]))
    twins.run(1)
    twins.each(lambda o: o.param_groups.clear())
    for optimizer in twins.sides:
        assert optimizer.step() is None


CASTS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@pytest.mark.parametrize(("first", "then"), CASTS, ids=str)
def test_model_cast_between_steps(row: Row, first: torch.dtype, then: torch.dtype) -> None:
    """After ``model.to(dtype)`` states still have the old dtype: stock's result and dtypes.

    Where a half type takes part, stock rounds more often, so both are held to a float64 step.
    """
    nets: list[nn.Module] = []

    def build() -> list[Tensor]:
        nets.append(nn.Linear(33, 17).to(first))
        return list(nets[-1].parameters())

    twins = Twins(row, build, **row.rich)
    exact = first in EXACT and then in EXACT

    def step() -> bool:
        twins.grads()
        expected = Float64Step(row.stock, twins.ours)
        if not twins.step_if_allowed():
            return False
        for p, q in twins.pairs():
            assert p.dtype == q.dtype
            for key, value in twins.stock.state[q].items():
                assert twins.ours.state[p][key].dtype == value.dtype
        if exact:
            twins.check()
        else:
            loose = 0.1 if torch.bfloat16 in (first, then) else 0.01
            for p, q in expected.twins:
                torch.testing.assert_close(p.double(), q, atol=loose, rtol=loose)
                for key, value in expected.exact.state[q].items():
                    mine = twins.ours.state[p][key].to(value.dtype)
                    torch.testing.assert_close(mine, value, atol=3 * loose, rtol=loose)
        return True

    assert step()
    for net in nets:
        net.to(then)
    if step():
        step()


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_grad_of_another_dtype(row: Row, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """A grad whose dtype is not the parameter's: stock promotes or refuses, so do we."""
    for options in (*row.structures, {**row.rich, "maximize": 1}):

        def build() -> list[Tensor]:
            p = Parameter(torch.randn(131, dtype=grad_dtype))
            p.grad = torch.randn(131, dtype=grad_dtype)
            p.data = p.data.to(dtype)
            return [p, Parameter(torch.randn(3))]

        twins = Twins(row, build, **options)
        for _ in range(3):
            if not twins.step_if_allowed():
                break
            twins.check()


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_states_of_another_dtype(
    row: Row, dtype: torch.dtype, grad_dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    """States of any dtype, as somebody has entered them: stock casts or refuses, so do we."""
    for options, weight_decay in itertools.product(({}, *row.structures), (0, 0.1)):

        def build() -> list[Tensor]:
            p = Parameter(torch.randn(131, dtype=grad_dtype))
            p.grad = torch.randn(131, dtype=grad_dtype)
            p.data = p.data.to(dtype)
            return [Parameter(torch.randn(3)), p]

        def enter_states(optimizer: torch.optim.Optimizer) -> None:
            first, p = all_params(optimizer)
            first.grad = torch.randn(3)
            for q, its in ((first, torch.float32), (p, state_dtype)):
                states = fresh_states(row, q.detach().to(torch.float32))
                optimizer.state[q] = {k: v.to(its) for k, v in states.items() if k != "step"}
                if row.counts:
                    optimizer.state[q] = {"step": states["step"], **optimizer.state[q]}

        twins = Twins(row, build, **{**options, "weight_decay": weight_decay})
        twins.each(enter_states)
        if twins.step_if_allowed():
            twins.check()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("dims", [0, 1])
def test_float64_tensor_options(row: Row, dtype: torch.dtype, dims: int) -> None:
    """Options that are float64 tensors, with which stock promotes a parameter of no dimension."""
    for name in ("lr", "weight_decay"):
        for seed in range(20):
            option = torch.full([1] * dims, 0.1, dtype=torch.float64)
            twins = Twins(row, parameters((), (1,), (3,), dtype=dtype), seed=seed, **row.rich)
            for optimizer in twins.sides:
                optimizer.param_groups[0][name] = option
            twins.grads()
            if twins.step_if_allowed(halfway=True):
                twins.check()


def test_default_dtype(row: Row) -> None:
    """Under a float64 default dtype."""
    torch.set_default_dtype(torch.float64)
    Twins(row, parameters(*ORDINARY_SHAPES, dtype=torch.float32), **row.rich).run(3)
    Twins(row, BUILD, **{**row.rich, "lr": torch.tensor(0.1)}).run(3)


def test_parameters_of_other_dtypes(row: Row) -> None:
    """Integer parameters do what they do in stock: lr 1 steps, lr 0.1 raises."""
    for lr in (1, 0.1):
        outcomes = []
        for cls, more in ((row.ours, {}), (row.stock, {"foreach": False})):
            p = torch.zeros(70, dtype=torch.int64)
            p.grad = torch.arange(1, 71)
            try:
                cls([p], lr=lr, **more).step()
                outcomes.append(p.tolist())
            except RuntimeError as refused:
                outcomes.append(str(refused).split("\n")[0])
        assert outcomes[0] == outcomes[1]


# Memory.


def test_lets_go_of_everything(row: Row) -> None:
    """Deleting the optimizer frees it, its states and parameters; no old tensor is held."""
    optimizer = row.ours(BUILD(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    grads = [weakref.ref(p.grad) for p in all_params(optimizer)]
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in grads), "a grad is held after zero_grad"
    for p in all_params(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in all_params(optimizer):
        p.grad = None
    optimizer.step()

    p = all_params(optimizer)[0]
    storage = StorageWeakRef(p.untyped_storage())
    p.data = torch.randn_like(p)
    assert storage.expired(), "the old memory of a parameter is held"

    state = weakref.ref(optimizer.state[p][row.states[0]])
    del optimizer.state[p]
    assert state() is None, "a deleted state is held"
    states = [weakref.ref(s[row.states[0]]) for s in optimizer.state.values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert not any(ref() is not None for ref in states), "states are held after loading others"

    removed = weakref.ref(optimizer.param_groups[0]["params"].pop())
    optimizer.state.clear()
    gc.collect()
    assert removed() is None, "a parameter that was removed is held"

    refs = [weakref.ref(optimizer), *(weakref.ref(p) for p in all_params(optimizer))]
    del optimizer, p
    gc.collect()
    assert not any(ref() is not None for ref in refs)


def test_optimizer_is_freed_without_the_collector(row: Row) -> None:
    """We add no reference cycle to stock's optimizer."""
    gc.collect()
    gc.disable()
    try:
        freed = []
        for cls in (row.ours, row.stock):
            optimizer = cls(BUILD(), **row.rich)
            for p in all_params(optimizer):
                p.grad = torch.randn_like(p)
            optimizer.step()
            ref = weakref.ref(optimizer)
            del optimizer, p
            freed.append(ref() is None)
        assert freed[0] or not freed[1]
    finally:
        gc.enable()


def test_parameter_lifetime_reuse(row: Row) -> None:
    """A new parameter at the address of a freed one does not inherit its state."""
    optimizer = row.ours([Parameter(torch.zeros(64))], **row.rich)
    for _ in range(50):
        fresh = Parameter(torch.ones(64))
        fresh.grad = torch.ones(64)
        optimizer.param_groups[0]["params"][:] = [fresh]
        optimizer.state.clear()
        optimizer.step()
        again = Parameter(torch.ones(64))
        again.grad = torch.ones(64)
        stock = row.stock([again], **row.rich, foreach=False)
        stock.step()
        assert_equal(list(optimizer.state.values()), list(stock.state.values()))
        del fresh


def test_a_closure_that_is_none(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if none were given, which is how wrappers call, and takes the same short way."""
    params = parameters(*ORDINARY_SHAPES)()
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
