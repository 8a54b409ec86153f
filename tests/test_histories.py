"""Random lives of an optimizer, ours and stock side by side (hypothesis).

A life is a list of acts, such as a user's program may have in any order: steps, edits of options
and states, checkpoints, copies, casts. After each act both sides are equal (:mod:`life`).

``make test`` runs a few lives of each optimizer, the same ones each time. For new ones at each run,
say how many::

    FASTSGD_LIVES=1000 .venv/bin/python -m pytest tests/test_histories.py -k Adam

A failure prints the shortest program that hypothesis has found for it, act by act.
"""

from __future__ import annotations

import copy
import functools
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, HALVES, OPTIMIZERS, Row
from life import EXTRAS, WAYS, Life, is_expanded, recorded, reversed_order, warming
from onepass import INF, NAN
from oracle import all_params, assert_equal
from snapshot import Snapshot
from strategies import BOUNDED, options_of, place, shapes, views
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler
from twins import FLAGS, fresh_states, random_grad

pytest.importorskip("hypothesis")
from hypothesis import Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

LIVES = int(os.environ.get("FASTSGD_LIVES", 0))
if LIVES:
    BOUNDS = settings(BOUNDED, max_examples=LIVES, stateful_step_count=50, derandomize=False)
else:
    BOUNDS = settings(BOUNDED, max_examples=50, stateful_step_count=30)
BOUNDS = settings(BOUNDS, phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False)


# --- what is drawn ------------------------------------------------------------------------------

# Of a parameter: which by number, counted round.
numbers = st.integers(0, 7)
# Mostly on both sides of a register's width, and of a few.
params = st.tuples(
    st.one_of(
        st.integers(1, 70).map(lambda n: (n,)),
        st.tuples(st.integers(1, 9), st.integers(1, 20)),
        shapes,
    ).flatmap(lambda shape: st.tuples(st.just(shape), views(shape))),
    st.sampled_from(DTYPES),
)


# For all parameters in turn, counted round.
ways = st.lists(st.sampled_from(WAYS), min_size=1, max_size=5)


def edits(row: Row) -> Any:
    """Changes of options, without those that soon leave nothing but NaN, or that stock refuses."""

    def tame(options: Any) -> bool:
        betas = options.get("betas", ())
        shaped = any(isinstance(v, Tensor) and v.dim() for v in [*options.values(), *betas])
        return options.get("alpha", 0) <= 1 and not shaped

    return st.one_of(
        st.sampled_from([o for o in [*row.options, *row.edits] if tame(o)]), options_of(row)
    )


def flags_of(row: Row, options: Any) -> Any:
    """Flags that a constructor takes with these options."""
    given = any(isinstance(value, (Tensor, tuple)) for value in options.values())
    foreach = {} if row.counts and given else {"foreach": True}
    return st.sampled_from([{}, row.fused, row.fused, foreach])


extras = st.sampled_from([(name, value) for name, values in EXTRAS.items() for value in values])


def scheduler(name: str, optimizer: Any) -> Any:
    """Make one of torch's."""
    if name == "OneCycleLR":
        group = optimizer.param_groups[0]
        number = group["betas"][0] if "betas" in group else group.get("momentum")
        # A momentum of RMSprop that it turns on lacks a state.
        cycles = isinstance(number, float) and not isinstance(optimizer, torch.optim.RMSprop)
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9999, cycle_momentum=cycles)
    if name == "LambdaLR":
        return lr_scheduler.LambdaLR(optimizer, warming)
    if name == "StepLR":
        return lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


SCHEDULERS = ("OneCycleLR", "LambdaLR", "StepLR", "CosineAnnealingLR")


ACTS: list[str] = []


def act(**drawn: Any) -> Any:
    """Make a rule of what is done, mostly followed by a step. False is for what could not be."""

    def decorate(do: Callable[..., Any]) -> Any:
        @functools.wraps(do)
        def done(self: History, then: list[str], **drawn: Any) -> None:
            self.acts[do.__name__] += do(self, **drawn) is not False
            if then:
                self.step_with_grads(then)

        ACTS.append(do.__name__)
        return rule(then=st.lists(st.sampled_from(WAYS), max_size=5), **drawn)(done)

    return decorate


# --- the acts -----------------------------------------------------------------------------------


def through_file(saved: Any, weights_only: bool = True) -> Any:
    """Save and load."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


class History(RuleBasedStateMachine, Life):
    """What a user may do to an optimizer; after each act both sides are equal."""

    acts: Counter[str]  # how often each has been done

    @initialize(
        options=st.runner().flatmap(lambda self: options_of(self.optimizer)),
        kinds=st.lists(params, min_size=1, max_size=4),
        wide=st.sampled_from([None, torch.float32]),
        besides=st.one_of(st.just([]), st.lists(extras, max_size=3)),
        data=st.data(),
    )
    def make(self, options: Any, kinds: Any, wide: Any, besides: Any, data: Any) -> None:
        """Build both."""
        flags = data.draw(flags_of(self.optimizer, options))
        torch.set_num_threads(1)

        def build() -> list[Tensor]:
            return [Parameter(place(*view, dtype)) for view, dtype in kinds]

        self.flags = flags
        self.begin(build, options, flags, [("ema_dtype", wide), *besides])
        self.schedulers: list[Any] = []
        self.saved = [self.save()]

    @invariant()
    def tells_nothing_apart(self) -> None:
        """After every act."""
        if self.twins is not None:
            self.equal()

    def step_with_grads(self, ways: Sequence[str]) -> None:
        """Give grads, step."""
        self.give(ways)
        self.step()
        self.acts["step_with_grads"] += 1

    @act()
    def step_again(self) -> None:
        """With the same grads."""
        self.step()

    @act(ways=ways, to_none=st.booleans())
    def step_with_a_closure(self, ways: Any, to_none: bool) -> None:
        """Backward, within the step."""
        ours, stock = self.twins.sides

        def closure(optimizer: Any) -> Tensor:
            torch.manual_seed(self.twins.seed)
            optimizer.zero_grad(to_none)
            found = all_params(optimizer)
            used = [p for i, p in enumerate(found) if ways[i % len(ways)] != "none"]
            loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
            loss = loss + sum((p * random_grad(p)).double().sum() for p in used)
            loss.backward()
            if optimizer is ours:
                self.look()
            return loss.detach()

        self.twins.seed += 1
        for p, q in self.twins.pairs():
            if is_expanded(p.grad):  # cannot be added to
                p.grad = q.grad = None
        mine = ours.step(lambda: closure(ours))
        theirs = closure(stock)
        self.follow()
        assert_equal(mine, theirs)

    @act(ways=ways, edit=st.sampled_from(["lr", "grads", "zero"]))
    def step_with_hooks(self, ways: Any, edit: str) -> None:
        """One before the step, that edits what it works on, and one after it, that clears."""
        ours, stock = self.twins.sides
        called = []

        def before(*_: Any) -> None:
            called.append("before")
            if edit == "lr":
                for optimizer in self.twins.sides:
                    for group in optimizer.param_groups:
                        group["lr"] = group["lr"] * 0.5
            elif edit == "grads":
                self.give(ways)
            self.look()

        def after(*_: Any) -> None:
            called.append("after")
            if edit == "zero":
                ours.zero_grad()

        handles = [
            ours.register_step_pre_hook(before),
            ours.register_step_post_hook(after),
        ]
        ours.step()
        for handle in handles:
            handle.remove()
        assert called == ["before", "after"]
        self.follow()
        if edit == "zero":
            stock.zero_grad()

    @act(
        ways=ways,
        overflow=st.sampled_from([None, None, INF, NAN]),
        unscale=st.booleans(),
        scale=st.sampled_from([256.0, 1000.0]),
    )
    def step_with_a_scaler(self, ways: Any, overflow: Any, unscale: bool, scale: float) -> Any:
        """``GradScaler``, whose scale a fused step divides by itself; an overflow skips."""
        ours, stock = self.twins.sides
        if self.named_twice:
            return False  # the scaler itself unscales such a grad twice
        self.give([{"expanded": "new", "negated": "new", "kept": "new"}.get(w, w) for w in ways])
        called = getattr(ours, "_step_supports_amp_scaling", False)  # on overflow too
        inside = called and not unscale
        for p, q in self.twins.pairs():
            if p.dtype == torch.float16 and not inside:  # which the scaler refuses
                p.grad = q.grad = None
        given = [(p, q) for p, q in self.twins.pairs() if p.grad is not None and p.numel()]
        if not given:
            return False
        dtypes = {p.dtype for p, _ in given}
        if not inside or len(dtypes) > 1 or dtypes & set(HALVES):
            scale = 256.0  # by which all divide without rounding
        for p, q in given:
            p.grad.mul_(scale)
            q.grad.copy_(p.grad / scale)
        self.look(scale)
        first = given[0][0].grad
        if overflow is not None:
            first[(0,) * first.dim()] = overflow
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if overflow is None:
            self.follow()
        elif called:
            self.clear()
        keeps = inside and any(self.extras_on())
        for p, q in given:
            if q.grad is not None:
                if overflow is None and ours.clear_grads is False:
                    assert_equal(p.grad, q.grad * scale if keeps else q.grad)
                q.grad.copy_(p.grad)
        return None

    @act(which=numbers, value=st.sampled_from([INF, -INF, NAN]), skip=st.booleans(), ways=ways)
    def step_that_is_not_finite(self, which: int, value: float, skip: bool, ways: Any) -> Any:
        """Without a scaler; and back to what was before, unless the step was skipped."""
        if not self.named_twice:
            self.ask_for("skip_nonfinite", skip)
        self.give(["new" if way in ("expanded", "negated") else way for way in ways])
        grad = self.param(which).grad
        if grad is None or not grad.numel() or grad.is_neg() or is_expanded(grad):
            return False
        for optimizer in self.twins.sides:
            grad = self.param(which, optimizer).grad
            grad[(0,) * grad.dim()] = value
        saved = self.save()
        self.step()
        self.equal()
        if not self.due.skips:
            self.load(saved, crossed=False)
        self.give(["new"])
        return None

    @act(which=numbers, wrong=st.sampled_from(["option", "state", "groups"]))
    def step_that_raises(self, which: int, wrong: str) -> Any:
        """It changes nothing, and when the mistake is mended all is as before."""
        ours = self.twins.ours
        self.give(["new"])
        p = self.param(which)
        group = next(g for g in ours.param_groups if any(p is q for q in g["params"]))
        if wrong == "state":
            names = [n for n in self.optimizer.plain_states if n in ours.state.get(p, {})]
            if not names:
                return False
            owner, key, bad = ours.state[p], names[0], torch.ones(*p.shape, 3, dtype=p.dtype)
        elif wrong == "option":
            owner, key, bad = group, "lr", "fast"
        else:
            owner, key, bad = group, "params", [*group["params"], "no parameter"]
        owner[key], was = bad, owner[key]
        snapshot = Snapshot(ours)
        with pytest.raises(Exception):  # noqa: B017
            ours.step()
        snapshot.assert_unchanged()
        owner[key] = was
        return None

    # Between steps.

    @act(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        """Clear."""
        for optimizer in self.twins.sides:
            optimizer.zero_grad(to_none)

    @act(which=numbers, options=st.runner().flatmap(lambda self: edits(self.optimizer)))
    def edit_options(self, which: int, options: Any) -> None:
        """Of one group. States that are asked for then are put there."""

        def edit(optimizer: Any) -> None:
            groups = optimizer.param_groups
            edited = groups[which % len(groups)]
            edited.update(copy.deepcopy({k: v for k, v in options.items() if k not in FLAGS}))
            for p in edited["params"] if self.optimizer.counts else ():
                if optimizer.state.get(p):
                    for name, value in fresh_states(self.optimizer, p).items():
                        optimizer.state[p].setdefault(name, value)

        self.twins.each(edit)

    @act(factor=st.sampled_from([0.5, 0.9, 1.5]))
    def edit_tensors_of_options(self, factor: float) -> None:
        """In place; a number becomes a tensor first."""

        def edit(optimizer: Any) -> None:
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = torch.tensor(float(group["lr"]))
                group["lr"].mul_(factor)

        self.twins.each(edit)

    @act(name=st.sampled_from(SCHEDULERS))
    def step_schedulers(self, name: str) -> None:
        """They edit lr, and some momentum or betas. Those there are, or new ones."""
        if not self.schedulers:
            self.schedulers = [scheduler(name, optimizer) for optimizer in self.twins.sides]
        for each in self.schedulers:
            each.step()

    @precondition(lambda self: self.twins and len(self.twins.ours.param_groups) < 4)
    @act(
        options=st.runner().flatmap(lambda self: options_of(self.optimizer)),
        kinds=st.lists(params, min_size=1, max_size=2),
    )
    def add_group(self, options: Any, kinds: Any) -> None:
        """One more."""

        def add(optimizer: Any) -> None:
            made = [Parameter(place(*view, dtype)) for view, dtype in kinds]
            optimizer.add_param_group({"params": made, **copy.deepcopy(options)})

        self.twins.each(add)
        self.schedulers = []

    @act(what=st.sampled_from(["groups", "parameters", "dicts", "lists"]))
    def reorder(self, what: str) -> None:
        """Groups or parameters in another order; or the same in other containers."""
        for optimizer in self.twins.sides:
            if what == "groups":
                optimizer.param_groups.reverse()
            elif what == "parameters":
                for group in optimizer.param_groups:
                    group["params"].reverse()
            elif what == "dicts":
                optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
                optimizer.state = defaultdict(
                    dict, {p: dict(own) for p, own in optimizer.state.items()}
                )
            else:
                for group in optimizer.param_groups:
                    group["params"] = list(group["params"])

    @act(which=numbers, kind=params, same=st.booleans())
    def replace_parameter(self, which: int, kind: Any, same: bool) -> Any:
        """Another in its place, or of another shape in the same; without a state."""
        if self.named_twice:
            return False

        def replace(optimizer: Any) -> None:
            old = self.param(which, optimizer)
            new = Parameter(place(*kind[0], kind[1]))
            optimizer.state.pop(old, None)
            if same:
                old.grad = None
                old.data = new.data
                return
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]

        self.twins.each(replace)
        return None

    @act(which=numbers, data=st.data())
    def swap_data(self, which: int, data: Any) -> None:
        """Other memory, laid out in another way, under a parameter."""
        view = data.draw(views(tuple(self.param(which).shape)))

        def swap(optimizer: Any) -> None:
            p = self.param(which, optimizer)
            p.data = place(tuple(p.shape), view, p.dtype)

        self.twins.each(swap)

    @act(which=numbers)
    def name_twice(self, which: int) -> Any:
        """Name a parameter again, in its group where that decides its states; or take it back."""
        found = all_params(self.twins.ours)
        exact = [i for i, p in enumerate(found) if p.dtype in EXACT]
        if not exact:
            return False
        for name, values in EXTRAS.items():  # without, as clipping would scale its grad twice
            self.ask_for(name, values[0])
        which = exact[which % len(exact)]
        twice = self.named_twice
        for optimizer in self.twins.sides:
            if not twice:
                p, groups = self.param(which, optimizer), optimizer.param_groups
                own = groups[-1]
                if self.optimizer.counts:
                    own = next(g for g in groups if any(p is q for q in g["params"]))
                own["params"].append(p)
                continue
            found = dict.fromkeys(all_params(optimizer))
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if found.pop(p, p) is None]
        return None

    @act(
        which=numbers,
        how=st.sampled_from(["delete", "none", "assign", "refill", "clone", "count", "clear"]),
    )
    def edit_state(self, which: int, how: str) -> None:
        """States deleted, set to None, replaced, written."""

        def edit(optimizer: Any) -> None:
            p = self.param(which, optimizer)
            own = optimizer.state.get(p, {})
            fresh = fresh_states(self.optimizer, p)
            if how == "delete":
                optimizer.state.pop(p, None)
            elif how == "clear":
                optimizer.state.clear()
            for name, value in own.items():
                if not isinstance(value, Tensor) or name == "ema":
                    continue
                if how == "none" and not self.optimizer.counts:
                    own[name] = None
                elif how == "assign":
                    own[name] = fresh[name]
                elif how == "refill":
                    value.copy_(fresh[name])
                elif how == "clone":
                    own[name] = reversed_order(value).clone()
                elif how == "count" and name == "step":
                    own[name] = torch.tensor(7.0)

        self.twins.each(edit)

    @act(which=st.sets(numbers, min_size=1), dtype=st.sampled_from(DTYPES), states=st.booleans())
    def cast(self, which: Any, dtype: torch.dtype, states: bool) -> Any:
        """As ``model.to`` does: parameter and grad; states too where stock asks for one dtype."""
        if dtype in HALVES and self.named_twice:
            return False

        def to(optimizer: Any) -> None:
            chosen = list(dict.fromkeys(self.param(i, optimizer) for i in sorted(which)))
            nn.ParameterList(chosen).to(dtype)
            for p in chosen:
                own = optimizer.state.get(p, {})
                for name, value in own.items():
                    if name == "ema":
                        own[name] = value.to(self.dtype_of_average(p))
                    elif name != "step" and (states or self.optimizer.counts):
                        own[name] = None if value is None else value.to(dtype)

        self.twins.each(to)
        return None

    @act(extra=extras)
    def set_extra(self, extra: Any) -> Any:
        """One of the things that a step may do besides."""
        name, value = extra
        if self.named_twice:
            return False
        self.ask_for(name, value)
        return None

    @act()
    def use_averages(self) -> Any:
        """Within ``ema_weights`` the parameters hold them; after it their own."""
        ours, stock = self.twins.sides
        if self.named_twice:
            return False
        if ours.ema_decay is None or not self.averaged:
            self.ask_for("ema_decay", 0.9)
            self.step_with_grads(["new"])
        with ours.ema_weights():
            for p, q in self.twins.pairs():
                average = stock.state.get(q, {}).get("ema", q)
                assert_equal(p.detach(), average.detach().to(p.dtype))
        return None

    @act(count=st.sampled_from([1, 2, 8]))
    def change_threads(self, count: int) -> None:
        """Another number of threads."""
        torch.set_num_threads(count)

    # Checkpoints and copies.

    @act(in_a_file=st.booleans())
    def exchange_checkpoints(self, in_a_file: bool) -> None:
        """Each side loads the other's."""
        saved = self.save()
        if in_a_file:
            saved["sides"] = through_file(saved["sides"])
        self.load(saved, crossed=True)
        self.schedulers = []

    @act()
    def save_for_later(self) -> None:
        """Save."""
        self.saved.append(self.save())

    @act(which=numbers, crossed=st.booleans())
    def go_back(self, which: int, crossed: bool) -> Any:
        """Load a checkpoint of this life; one with other groups is refused."""
        saved = self.saved[which % len(self.saved)]
        ours = self.twins.ours
        groups = [len(g["params"]) for g in ours.param_groups]
        if groups != [len(g["params"]) for g in saved["sides"][0]["param_groups"]]:
            for optimizer, side in zip(self.twins.sides, saved["sides"], strict=True):
                with pytest.raises(ValueError):
                    optimizer.load_state_dict(copy.deepcopy(side))
            return None
        if [p.shape for p in saved["params"]] != [p.shape for p in all_params(ours)]:
            return False
        self.load(saved, crossed)
        self.schedulers = []
        return None

    @act(in_a_file=st.booleans())
    def resume(self, in_a_file: bool) -> Any:
        """In new optimizers over the same parameters, as a new process would."""
        if self.named_twice:
            return False
        ours, stock = self.twins.sides
        saved = self.save()
        if in_a_file:
            saved["sides"] = through_file(saved["sides"])

        def groups(optimizer: Any) -> Any:
            return [{"params": list(group["params"])} for group in optimizer.param_groups]

        self.twins.ours = self.optimizer.ours(groups(ours), lr=0.3, **self.flags, **self.extras)
        self.twins.stock = self.optimizer.stock(groups(stock), lr=0.3, foreach=False)
        self.load(saved, crossed=False)
        self.schedulers, self.skipped = [], 0
        return None

    @act(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_copies(self, how: str) -> None:
        """The originals step on, and the copies know nothing of it."""
        originals = self.twins.sides
        given = [[copy.deepcopy(p.grad) for p in all_params(o)] for o in originals]
        way = copy.deepcopy if how == "deepcopy" else lambda o: through_file(o, False)
        self.twins.ours, self.twins.stock = map(way, originals)
        for optimizer, grads in zip(self.twins.sides, given, strict=True):
            for p, grad in zip(all_params(optimizer), grads, strict=True):
                p.grad = grad
        originals[0].step()
        self.schedulers, self.skipped = [], 0


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
def test_histories(row: Row) -> None:
    """Run the machine; every act is done, and most of them step."""
    taken: list[Tensor] = []
    acts: Counter[str] = Counter()
    body = {"optimizer": row, "taken": taken, "acts": acts}
    with recorded(taken):
        run_state_machine_as_test(type(f"{row.name}History", (History,), body), settings=BOUNDS)
    print(f"{sum(acts.values())} acts: {acts}")
    if not LIVES:
        assert all(acts[name] for name in ACTS), acts
        assert acts["step_with_grads"] > sum(acts.values()) / 3, acts
