"""Random shapes, strides, options and histories, ours and stock side by side."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, HALVES, OPTIMIZERS, Row
from oracle import Float64Step, all_params, assert_equal, strides
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, check_state, fresh_states

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import (  # noqa: E402
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

# Mostly small, some beyond registers, a few beyond chunks.
lengths = st.one_of(st.integers(0, 9), st.integers(10, 70), st.sampled_from([127, 128, 129, 1025]))
shapes = st.one_of(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    lengths.map(lambda n: (n,)),
)


@st.composite
def views(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Draw strides and offset of a view of ``shape`` whose elements share no memory."""
    order = draw(st.permutations(range(len(shape))))
    found = [0] * len(shape)
    step = draw(st.sampled_from([1, 1, 1, 2, 3]))
    for d in order:
        found[d] = step
        step *= max(shape[d], 1) + draw(st.sampled_from([0, 0, 0, 1, 5]))
    return tuple(found), draw(st.sampled_from([0, 0, 1, 3, 8]))


@st.composite
def expanded_views(draw: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Draw strides and offset where some dimensions may have stride 0."""
    full, offset = draw(views(shape))
    kept = [s if draw(st.integers(0, 3)) else 0 for s in full]
    return tuple(kept), offset


def place(shape: tuple[int, ...], view: tuple[tuple[int, ...], int], dtype: torch.dtype) -> Tensor:
    """Return random memory as a view of ``shape``."""
    steps, offset = view
    reach = sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if 0 not in shape else 0
    memory = torch.randn(offset + max(reach, 0) + 1 + 8, dtype=torch.float64)
    memory = torch.where(memory.abs() < 1e-3, 0.5, memory).to(dtype)
    return memory.as_strided(shape, steps, offset)


@st.composite
def sgd_group(draw: Any) -> dict[str, Any]:
    """Options of a group, as a constructor takes them."""
    options: dict[str, Any] = {"lr": draw(st.sampled_from([0.0, 1e-3, 0.07, 1.0]))}
    if draw(st.booleans()):
        options["lr"] = torch.tensor(options["lr"])
    if draw(st.integers(0, 3)):
        options["momentum"] = draw(st.sampled_from([0.5, 0.9, 1.0]))
        if draw(st.booleans()):
            options["nesterov"] = True
        else:
            options["dampening"] = draw(st.sampled_from([0.0, 0.3, 1.0, 1.5]))
    options["weight_decay"] = draw(st.sampled_from([0, 0, 0.1, 2]))
    options["maximize"] = draw(st.booleans())
    return options


@st.composite
def other_group(draw: Any, row: Row) -> dict[str, Any]:
    """The same, from the combinations of the row."""
    options = dict(draw(st.sampled_from(row.options)))
    if not isinstance(options["lr"], Tensor):
        options["lr"] = draw(st.sampled_from([0.0, 1e-3, 0.07, 1.0]))
    options["weight_decay"] = draw(st.sampled_from([0, 0, 0.1, 2]))
    options["maximize"] = draw(st.booleans())
    return options


def group(row: Row) -> Any:
    """Options of a group."""
    return sgd_group() if row.name == "SGD" else other_group(row)


@st.composite
def tensors(draw: Any) -> tuple[tuple[int, ...], Any, Any, torch.dtype]:
    """A parameter: shape, its view, its grad's view, dtype."""
    shape = draw(shapes)
    grad = draw(st.one_of(views(shape), expanded_views(shape)))
    return shape, draw(views(shape)), grad, draw(st.sampled_from(DTYPES))


@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
@BOUNDED
@given(data=st.data())
def test_shapes_strides_and_options(row: Row, data: Any) -> None:
    """Groups of any options over parameters and grads of any layout, three steps."""
    groups = data.draw(
        st.lists(
            st.tuples(group(row), st.lists(tensors(), min_size=1, max_size=4)),
            min_size=1,
            max_size=3,
        )
    )
    threads = data.draw(st.sampled_from([1, 2, 8]))

    def build() -> list[dict[str, Any]]:
        return [
            {
                "params": [Parameter(place(shape, view, dtype)) for shape, view, _, dtype in many],
                **copy.deepcopy(options),
            }
            for options, many in groups
        ]

    kinds = [kind for _, many in groups for kind in many]
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        twins = Twins(row, build, lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            for (p, q), (shape, _, view, dtype) in zip(twins.pairs(), kinds, strict=True):
                p.grad = place(shape, view, dtype)
                # Stock's loops over stride 0 round a few elements in another way.
                expanded = any(s == 0 < n - 1 for s, n in zip(view[0], shape, strict=True))
                q.grad = p.grad.contiguous() if expanded else p.grad
            expected = Float64Step(row.stock, twins.ours)
            twins.step()
            expected.check()
            for p, q in twins.pairs():
                assert p.stride() == q.stride()
                assert (p in twins.ours.state) == (q in twins.stock.state)
                if p.dtype not in EXACT:
                    continue
                assert_equal(p.detach(), q.detach())
                for key, value in twins.stock.state.get(q, {}).items():
                    assert_equal(twins.ours.state[p][key], value)
    finally:
        torch.set_num_threads(was)


class History(RuleBasedStateMachine):
    """What a user may do to an optimizer, in any order; after each act both sides are equal.

    Half parameters are held to a float64 step from our own state; stock's are then set to ours.
    """

    optimizer: Row

    def __init__(self) -> None:
        """Begin without an optimizer."""
        super().__init__()
        self.twins: Twins | None = None
        self.scale = 1.0

    @initialize(data=st.data())
    def make(self, data: Any) -> None:
        """Build both."""
        options = data.draw(group(self.optimizer))
        kinds = data.draw(st.lists(tensors(), min_size=1, max_size=4))
        tensors_given = any(isinstance(v, (Tensor, tuple)) for v in options.values())
        allowed = [{}, {}, self.optimizer.fused]
        if not (self.optimizer.counts and tensors_given):  # which stock's constructor refuses
            allowed.append({"foreach": True})
        flags = data.draw(st.sampled_from(allowed))

        def build() -> list[Tensor]:
            return [Parameter(place(shape, view, dtype)) for shape, view, _, dtype in kinds]

        self.twins = Twins(self.optimizer, build, **options, **flags)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.scaler.scale(torch.ones(()))
        self.fused = bool(flags.get("fused"))

    def grads(self) -> None:
        """Give each parameter a new grad, or a part of them."""
        self.twins.grads(lambda p: torch.randn(p.shape, dtype=torch.float64).to(p.dtype) + 0.01)

    def stepped(self, step: Any) -> None:
        """Step ours by ``step``, stock plainly, halves against float64."""
        ours, stock = self.twins.sides
        params = all_params(ours)
        expected = Float64Step(self.optimizer.stock, ours)
        for optimizer in self.twins.sides:
            step(optimizer)
        if len(set(params)) == len(params):  # a float64 twin of a duplicate would be two
            expected.check()
        for p, q in self.twins.pairs():
            if p.dtype in HALVES:
                with torch.no_grad():
                    q.copy_(p)
                for key, value in ours.state.get(p, {}).items():
                    if isinstance(value, Tensor):
                        assert strides(value) == strides(stock.state[q][key])
                        stock.state[q][key].copy_(value)

    @rule()
    def step(self) -> None:
        """Plainly."""
        self.grads()
        self.stepped(lambda o: o.step())

    @rule()
    def step_again(self) -> None:
        """With the same grads."""
        self.stepped(lambda o: o.step())

    @rule()
    def step_with_a_closure(self) -> None:
        """A closure that makes the grads."""
        losses = []

        def act(optimizer: Any) -> None:
            def closure() -> Tensor:
                optimizer.zero_grad()
                # Exact in float64 beforehand: the grad is a constant of each parameter.
                loss = sum(
                    (p.detach() * 0 + 0.25).mul(p).sum().float() for p in all_params(optimizer)
                )
                loss.backward()
                return loss

            losses.append(optimizer.step(closure))

        for optimizer in self.twins.sides:
            for p in all_params(optimizer):
                p.grad = torch.full_like(p, 0.25)
        if not any(p.dtype in HALVES for p in all_params(self.twins.ours)):
            self.stepped(act)
            assert_equal(*losses)

    @rule(overflow=st.booleans(), unscale=st.booleans())
    def step_with_a_scaler(self, overflow: bool, unscale: bool) -> None:
        """Through GradScaler, where the flags and dtypes allow it; or an overflow, which skips."""
        ours, stock = self.twins.sides
        params = list(dict.fromkeys(all_params(ours)))
        if any(p.dtype == torch.float16 for p in params):
            return
        if len(params) < len(all_params(ours)):
            return  # the scaler itself unscales the grad of a duplicate twice
        if overflow and not any(p.numel() for p in params):
            return
        self.grads()
        expected = Float64Step(self.optimizer.stock, ours)
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad *= self.scaler.get_scale()
        if overflow:
            next(p for p in params if p.numel()).grad.fill_(float("inf"))
        if unscale:
            self.scaler.unscale_(ours)
        self.scaler.step(ours)
        self.scaler.update(256.0)
        if overflow:
            assert_equal([p.detach() for p in params], before)
        else:
            expected.check()
            stock.step()
            for p, q in self.twins.pairs():
                if p.dtype in HALVES:
                    with torch.no_grad():
                        q.copy_(p)
                    for key, value in ours.state.get(p, {}).items():
                        stock.state[q][key].copy_(value)
        for p, q in self.twins.pairs():
            q.grad = None if p.grad is None else p.grad.clone()

    @rule(data=st.data())
    def drop_grads(self, data: Any) -> None:
        """Some grads vanish."""
        gone = data.draw(st.sets(st.integers(0, 8)))
        for optimizer in self.twins.sides:
            for i in gone:
                if i < len(all_params(optimizer)):
                    all_params(optimizer)[i].grad = None

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        """Clear."""
        for optimizer in self.twins.sides:
            optimizer.zero_grad(set_to_none)

    @rule(data=st.data())
    def change_options(self, data: Any) -> None:
        """Options of a group."""
        options = data.draw(group(self.optimizer))
        if self.optimizer.counts:  # what was turned on later would lack a state
            for name in self.optimizer.structural:
                options.pop(name, None)
        which = data.draw(st.integers(0, 5))
        for optimizer in self.twins.sides:
            groups = optimizer.param_groups
            groups[which % len(groups)].update(copy.deepcopy(options))

    @precondition(lambda self: self.twins and len(self.twins.ours.param_groups) < 4)
    @rule(data=st.data())
    def add_group(self, data: Any) -> None:
        """One more group."""
        options = data.draw(group(self.optimizer))
        kinds = data.draw(st.lists(tensors(), min_size=1, max_size=2))

        def add(optimizer: Any) -> None:
            made = [Parameter(place(shape, view, dtype)) for shape, view, _, dtype in kinds]
            optimizer.add_param_group({"params": made, **copy.deepcopy(options)})

        self.twins.each(add)

    @rule(which=st.integers(0, 8), data=st.data())
    def swap_data(self, which: int, data: Any) -> None:
        """Other memory, laid out in another way, under a parameter."""
        params = all_params(self.twins.ours)
        p = params[which % len(params)]
        view = data.draw(views(tuple(p.shape)))

        def swap(optimizer: Any) -> None:
            p = all_params(optimizer)[which % len(params)]
            p.data = place(tuple(p.shape), view, p.dtype)

        self.twins.each(swap)

    @rule(which=st.integers(0, 8), how=st.sampled_from(["delete", "none", "assign", "clone"]))
    def edit_state(self, which: int, how: str) -> None:
        """A state deleted, set to None, assigned, copied."""

        def edit(optimizer: Any) -> None:
            params = all_params(optimizer)
            p = params[which % len(params)]
            if p not in optimizer.state:
                return
            fresh = fresh_states(self.optimizer, p)
            for name, value in list(optimizer.state[p].items()):
                if how == "delete":
                    optimizer.state.pop(p, None)
                elif how == "none":
                    optimizer.state[p][name] = value if self.optimizer.counts else None
                elif how == "assign":
                    optimizer.state[p][name] = fresh[name]
                elif value is not None:
                    optimizer.state[p][name] = value.clone(memory_format=torch.contiguous_format)

        self.twins.each(edit)

    @rule()
    def exchange_checkpoints(self) -> None:
        """Each side loads the other's."""
        mine, theirs = (copy.deepcopy(o.state_dict()) for o in self.twins.sides)
        for group in mine["param_groups"]:
            group.update(foreach=False, fused=None)
        self.twins.ours.load_state_dict(theirs)
        self.twins.stock.load_state_dict(mine)

    @rule(how=st.sampled_from(["deepcopy", "save"]))
    def copy_optimizers(self, how: str) -> None:
        """Go on with copies."""

        def again(optimizer: Any) -> Any:
            if how == "deepcopy":
                return copy.deepcopy(optimizer)
            file = io.BytesIO()
            torch.save(optimizer, file)
            file.seek(0)
            return torch.load(file, weights_only=False)

        grads = [[p.grad for p in all_params(o)] for o in self.twins.sides]
        self.twins.ours, self.twins.stock = map(again, self.twins.sides)
        for optimizer, kept in zip(self.twins.sides, grads, strict=True):
            for p, g in zip(all_params(optimizer), kept, strict=True):
                p.grad = None if g is None else g.clone()
        # Attributes such as the support of scaling are not pickled, in stock either.

    @rule(which=st.integers(0, 8))
    def duplicate(self, which: int) -> None:
        """Name a parameter again in the last group, or take away a name that was given twice."""
        for optimizer in self.twins.sides:
            params = all_params(optimizer)
            if any(p.dtype in HALVES for p in params):
                return
            if len(params) > 5:
                last = optimizer.param_groups[-1]["params"]
                if sum(p is last[-1] for p in params) > 1:
                    last.pop()
            else:
                optimizer.param_groups[-1]["params"].append(params[which % len(params)])

    @rule(which=st.integers(0, 8))
    def cast(self, which: int) -> None:
        """float32 to float64 and back, as ``model.to`` does: parameter and grad, not the state.

        The state too where stock may ask for one dtype of all.
        """

        def to(optimizer: Any) -> None:
            params = all_params(optimizer)
            p = params[which % len(params)]
            if p.dtype in EXACT:
                other = EXACT[1 - EXACT.index(p.dtype)]
                grad = p.grad
                p.grad = None
                p.data = p.data.to(other)
                p.grad = None if grad is None else grad.to(other)
                if self.optimizer.counts and p in optimizer.state:
                    for name in optimizer.state[p].keys() - {"step"}:
                        optimizer.state[p][name] = optimizer.state[p][name].to(other)

        self.twins.each(to)

    @rule(count=st.sampled_from([1, 2, 8]))
    def change_threads(self, count: int) -> None:
        """Another number of threads."""
        torch.set_num_threads(count)

    @invariant()
    def equal(self) -> None:
        """Nothing tells the sides apart."""
        if self.twins is None:
            return
        for p, q in self.twins.pairs():
            assert_equal(p.detach(), q.detach())
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                assert_equal(p.grad, q.grad)
            assert (p in self.twins.ours.state) == (q in self.twins.stock.state)
            if p in self.twins.ours.state:
                check_state(self.twins.ours.state[p], self.twins.stock.state[q])


@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
def test_histories(row: Row) -> None:
    """Run the machine."""
    machine = type(f"{row.name}History", (History,), {"optimizer": row})
    bounds = settings(BOUNDED, max_examples=60, stateful_step_count=30)
    run_state_machine_as_test(machine, settings=bounds)


ACTS = ("share states", "own states", "share grads", "new grads", "share memory", "own memory")


@pytest.mark.parametrize("row", OPTIMIZERS, ids=repr)
@settings(BOUNDED, max_examples=15)
@given(
    acts=st.lists(st.sampled_from([*ACTS, "options"]), min_size=2, max_size=8),
    options=st.lists(st.sampled_from(["plain", "rich"]), min_size=12, max_size=12),
    ends=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=12, max_size=12),
    threads=st.sampled_from([2, 8]),
)
def test_sharing_comes_and_goes(
    row: Row, acts: list[str], options: list[str], ends: list[tuple[int, int]], threads: int
) -> None:
    """Tensors large enough for several threads begin and cease to share memory between steps."""
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        twins = Twins(row, lambda: [Parameter(torch.randn(70_000)) for _ in range(4)], **row.rich)
        twins.run(1)
        for act, chosen, (i, j) in zip(acts, options, ends, strict=False):

            def do(optimizer: Any, act: str = act, chosen: str = chosen, i: int = i, j: int = j):
                p, q = all_params(optimizer)[i], all_params(optimizer)[j]
                if act == "share states":
                    optimizer.state[p].update(optimizer.state[q])
                elif act == "own states":
                    own = {k: v.clone() for k, v in optimizer.state[p].items()}
                    optimizer.state[p].update(own)
                elif act == "share grads":
                    p.grad = q.grad
                elif act == "new grads":
                    for p in all_params(optimizer):
                        p.grad = torch.randn_like(p)
                elif act == "share memory":
                    p.data = q.data
                elif act == "own memory":
                    p.data = torch.randn_like(p)
                else:
                    optimizer.param_groups[0].update(row.off if chosen == "plain" else row.rich)

            twins.each(do)
            for _ in range(2):
                torch.set_num_threads(threads)
                twins.ours.step()
                torch.set_num_threads(1)
                twins.stock.step()
                for p, q in twins.pairs():
                    assert torch.equal(p, q)
    finally:
        torch.set_num_threads(was)
