"""Hooks around a step, and what a profiler sees of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Row
from oracle import all_params, assert_equal
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from twins import ORDINARY, Twins, parameters, stepped


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
    twins = Twins(row, ORDINARY, **row.rich)

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
    twins = Twins(row, ORDINARY, **row.rich).run(1)
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
        *((ORDINARY, dict(options), sparse) for options in row.sparse[:1]),
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
    for optimizer in Twins(row, ORDINARY, **row.rich).sides:
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
    optimizer = row.ours(ORDINARY(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    before = copy.deepcopy([p.detach() for p in all_params(optimizer)])
    optimizer.register_step_pre_hook(lambda *_: result)
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()
    assert_equal([p.detach() for p in all_params(optimizer)], before)


def test_hooks_may_change_the_step(row: Row) -> None:
    """A pre-hook may edit grads and options, and the step sees it; hooks may remove themselves."""
    twins = Twins(row, ORDINARY, **row.rich)
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

    named = Named(ORDINARY(), **row.rich)
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

    optimizer = Traced(ORDINARY(), **row.rich)
    record_names(optimizer.step)
    assert calls == [optimizer]


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

    twins = Twins(row.derived(derive), ORDINARY, **row.rich).run(3)
    assert twins.ours.count == twins.stock.count == 3
    events = hook_events(twins.ours, twins.ours.step)
    assert len(events) == 5, "stock's are 10 once the base was instantiated, whose step it wraps"


def test_derived_from_a_derived_class(row: Row) -> None:
    """Hooks run once, whichever class was instantiated first; and both can be pickled by value."""
    cloudpickle = pytest.importorskip("cloudpickle")
    for first in (False, True):

        class Once(row.ours):  # type: ignore[misc, name-defined]
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        class Twice(Once):
            def step(self, closure: Any = None) -> Any:
                return super().step(closure)

        if first:
            Once(ORDINARY(), **row.rich)
        optimizer = Twice(ORDINARY(), **row.rich)
        assert len(hook_events(optimizer, optimizer.step)) == 5
        for cls in (Once, Twice):
            copied = cloudpickle.loads(cloudpickle.dumps(cls(ORDINARY(), **row.rich)))
            events = hook_events(copied, copied.step)
            assert len([name for name, *_ in events if name.startswith("own")]) == 3


@pytest.mark.parametrize("how", ["method", "class", "twice", "raises"])
def test_hooks_around_a_step_of_the_base(row: Row, how: str) -> None:
    """They run once for each step that is called, whichever that is."""

    class Derived(row.ours):  # type: ignore[misc, name-defined]
        def step(self, closure: Any = None) -> Any:
            if how == "twice":
                super().step()
            if how == "raises":
                raise KeyError
            return super().step(closure)

        def other_step(self) -> Any:
            return super().step()

    optimizer = Derived(ORDINARY(), **row.rich)
    for p in all_params(optimizer):
        p.grad = torch.ones_like(p)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    if how == "method":
        optimizer.other_step()
    elif how == "class":
        row.ours.step(optimizer)
    elif how == "twice":
        optimizer.step()
    else:
        with pytest.raises(KeyError):
            optimizer.step()
        calls.clear()
        optimizer.other_step()
    assert calls == ["before", "after"]
