"""The state ``step``, which counts a parameter's steps: what it is, and what else it may be."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, OPTIMIZERS, ORDINARY_SHAPES, Row, flagged
from oracle import Float64Step, all_params, assert_equal
from snapshot import Snapshot
from torch import Tensor
from torch.nn import Parameter
from twins import Twins, parameters

COUNTING = tuple(row for row in OPTIMIZERS if row.counts)


@pytest.fixture(params=COUNTING, ids=repr)
def row(request: pytest.FixtureRequest) -> Row:
    """Every optimizer that counts."""
    return request.param


def steps(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the counters of all parameters that have one."""
    return [own["step"] for own in optimizer.state.values()]


# What it is.


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "flags", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}], ids=str
)
def test_states_are_stocks(
    row: Row, dtype: torch.dtype, default: torch.dtype, flags: dict[str, Any]
) -> None:
    """Names in their order, types, dtypes, shapes and strides, ``step`` among them."""
    if not row.takes(*flags):
        pytest.skip("stock has no such flag")
    torch.set_default_dtype(default)
    seen = []
    for cls in (row.ours, row.stock):
        params = parameters(*ORDINARY_SHAPES, dtype=dtype)()
        params.append(Parameter(torch.randn(33, 17, dtype=dtype).t()))
        optimizer = cls(params, **row.rich, **flags)
        for p in params:
            p.grad = torch.ones_like(p)
        if cls is row.stock and "capturable" in flags:  # which refuses to step on the CPU
            optimizer.param_groups[0]["capturable"] = False
        for _ in range(2):
            optimizer.step()
        states = [optimizer.state[p] for p in params]
        seen.append(
            [
                [
                    (k, type(v), v.dtype, v.shape, v.stride(), v.device, v.requires_grad)
                    for k, v in own.items()
                ]
                for own in states
            ]
        )
        assert [float(own["step"]) for own in states] == [2.0] * len(params)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("options", ["plain", "rich"])
def test_counts_its_own_parameter(row: Row, options: str) -> None:
    """Parameters of one group that are at different steps, over several threads too."""
    twins = Twins(row, parameters((70,), (5,), (300_001,), (33, 17)), **getattr(row, options))
    for step in range(12):
        twins.grads()
        for optimizer in twins.sides:
            for i, p in enumerate(all_params(optimizer)):
                if step % (i + 1):
                    p.grad = None
        twins.step()
        twins.check()
    counts = [float(twins.ours.state[p]["step"]) for p in all_params(twins.ours)]
    assert counts == [12, 6, 4, 3]


@pytest.mark.parametrize("first", [0.0, 1e3, 2.0**24 - 2, 2.0**24, 1e30])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_large_counts(row: Row, dtype: torch.dtype, first: float) -> None:
    """A float32 counter stops at 2^24, as in stock."""
    torch.set_default_dtype(dtype)
    twins = Twins(row, parameters((131,), (5,), dtype=dtype), **row.rich).run(1)
    for optimizer in twins.sides:
        for step in steps(optimizer):
            step.fill_(first)
    twins.run(4)


# What it may have become.


def an_integer_tensor(step: Tensor) -> Any:
    return step.to(torch.int64)


def another_float(step: Tensor) -> Any:
    return step.to(torch.float64 if step.dtype == torch.float32 else torch.float32)


def a_half(step: Tensor) -> Any:
    return step.to(torch.bfloat16)


def of_one_dimension(step: Tensor) -> Any:
    return step.reshape(1).clone()


def of_more_dimensions(step: Tensor) -> Any:
    return step.reshape(1, 1, 1).clone()


def within_others(step: Tensor) -> Any:
    return torch.stack([step - 1, step, step + 1])[1]


def expanded(step: Tensor) -> Any:
    return step.clone().expand(1, 1)


def negated(step: Tensor) -> Any:
    return torch._neg_view(-step)


def fractional(step: Tensor) -> Any:
    return step + 0.25


def negative(step: Tensor) -> Any:
    return step - 7.0


def zero(step: Tensor) -> Any:
    return torch.zeros_like(step)


def no_number(step: Tensor) -> Any:
    return step * float("nan")


def infinite(step: Tensor) -> Any:
    return step * float("inf")


FORMS: list[Callable[[Tensor], Any]] = [
    an_integer_tensor,
    another_float,
    a_half,
    of_one_dimension,
    of_more_dimensions,
    within_others,
    expanded,
    negated,
    fractional,
    negative,
    zero,
    no_number,
    infinite,
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("which", [slice(None), slice(1, 2)], ids=["all", "one"])
def test_other_forms(row: Row, form: Callable[[Tensor], Any], which: slice) -> None:
    """A counter put in the place of another: stock's result, in that same tensor."""
    twins = Twins(row, parameters((131,), (5,), (33, 17)), **row.rich).run(2)
    for optimizer in twins.sides:
        for own in [optimizer.state[p] for p in all_params(optimizer)][which]:
            own["step"] = form(own["step"])
    held = steps(twins.ours)
    for _ in range(3):
        twins.grads()
        if not twins.step_if_allowed():
            assert form is negative, "stock finds a complex number"
            return
        twins.check()
        assert all(a is b for a, b in zip(steps(twins.ours), held, strict=True))


@pytest.mark.parametrize("number", [int, float], ids=["int", "float"])
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_numbers_in_a_checkpoint(row: Row, number: type, which: str) -> None:
    """Old checkpoints count with Python numbers; the loader makes tensors of them, as stock's."""
    twins = Twins(row, parameters((131,), (5,), (33, 17)), **row.rich).run(2)
    saved = copy.deepcopy(twins.stock.state_dict())
    for i, own in saved["state"].items():
        if which in ("all", {0: "first", 2: "last"}.get(i)):
            own["step"] = number(own["step"])
    for optimizer in twins.sides:
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert all(isinstance(step, Tensor) for step in steps(twins.ours))
    twins.run(3)


@pytest.mark.parametrize("bad", [3, 3.0, None, "text", torch.ones(2), torch.ones(0)], ids=repr)
def test_no_counters(row: Row, bad: Any) -> None:
    """What is no counter is refused in one sentence, and nothing was written."""
    twins = Twins(row, parameters((131,), (5,), (33, 17)), **row.rich).run(2)
    twins.grads()
    optimizer = twins.ours
    optimizer.state[all_params(optimizer)[1]]["step"] = bad
    snapshot = Snapshot(optimizer)
    with pytest.raises((TypeError, RuntimeError)) as refused:
        optimizer.step()
    snapshot.assert_unchanged()
    said = str(refused.value).splitlines()[0]
    assert "param_groups[0]['params'][1]" in said and "'step'" in said
    assert "[2]" not in said.replace("['params'][", "") or isinstance(bad, Tensor)
    optimizer.state[all_params(optimizer)[1]]["step"] = torch.tensor(2.0)
    twins.step()
    twins.check()


def test_inference_counter(row: Row) -> None:
    """A counter that may be written in inference mode only is not written outside of it."""
    optimizer = Twins(row, parameters((131,), (5,)), **row.rich).run(1).ours
    with torch.inference_mode():
        optimizer.state[all_params(optimizer)[1]]["step"] = torch.tensor(1.0)
    snapshot = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match="[Ii]nference"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_freed_counter(row: Row) -> None:
    """A counter whose memory was given back."""
    optimizer = Twins(row, parameters((131,), (5,)), **row.rich).run(1).ours
    p = all_params(optimizer)[0]
    before = p.detach().clone()
    optimizer.state[all_params(optimizer)[1]]["step"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert_equal(p.detach(), before)


# Shared.


@pytest.mark.parametrize("n", [17, 300_001])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_counter_for_two(row: Row, n: int, groups: int) -> None:
    """The second parameter counts on from the first, as in stock."""
    torch.set_num_threads(2)

    def build() -> list[dict[str, Any]]:
        params = [Parameter(torch.randn(n)) for _ in range(3)]
        return [{"params": params}] if groups == 1 else [{"params": [p]} for p in params]

    twins = Twins(row, build, **row.rich).run(2)
    for optimizer in twins.sides:
        p, _, r = all_params(optimizer)
        optimizer.state[r]["step"] = optimizer.state[p]["step"]
    twins.run(3)
    assert float(steps(twins.ours)[0]) == 8
    for optimizer in twins.sides:  # and each its own again
        r = all_params(optimizer)[2]
        optimizer.state[r]["step"] = optimizer.state[r]["step"].clone()
    twins.run(2)


def test_counters_side_by_side(row: Row) -> None:
    """Counters in one tensor, which do not overlap."""
    twins = Twins(row, parameters((131,), (5,), (33, 17)), **row.rich).run(2)
    for optimizer in twins.sides:
        memory = torch.full((3,), 2.0)
        for step, own in zip(memory.unbind(), optimizer.state.values(), strict=True):
            own["step"] = step
    twins.run(3)


def test_counter_within_a_state_or_a_grad(row: Row) -> None:
    """A counter that is an element of what the step reads and writes."""
    for where in ("state", "grad", "parameter"):
        twins = Twins(row, parameters((131,), (5,)), **row.plain).run(1)
        twins.grads()
        for optimizer in twins.sides:
            p, q = all_params(optimizer)
            state = optimizer.state[p][row.states[0]]
            memory = {"state": state, "grad": p.grad, "parameter": p.detach()}[where]
            memory[7] = 3.0
            optimizer.state[q]["step"] = memory[7]
        for _ in range(2):
            twins.step()
            twins.check()


def test_counter_shared_after_a_step_without_it(row: Row) -> None:
    """No stream moves, and each counter is where the last, or the one before, was then."""
    twins = Twins(row, parameters((0,), (33,)), **row.rich)
    grads: dict[Any, list[Tensor]] = {}

    def step(optimizer: torch.optim.Optimizer, counts: bool) -> None:
        empty, other = all_params(optimizer)
        kept = grads.setdefault(optimizer, [torch.randn_like(p) for p in (empty, other)])
        empty.grad, other.grad = (kept[0] if counts else None), kept[1]
        optimizer.step()

    for counts in (True, True, False):
        twins.each(functools.partial(step, counts=counts))
    for optimizer in twins.sides:
        empty, other = all_params(optimizer)
        optimizer.state[empty]["step"] = optimizer.state[other]["step"]
        grads[optimizer][1].mul_(3)
    twins.each(functools.partial(step, counts=True))
    twins.check()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_counts_an_empty_parameter_twice(row: Row) -> None:
    """It has no memory that would tell that it stands there twice."""
    for cls in (row.ours, row.stock):
        p = Parameter(torch.empty(0, 3))
        p.grad = torch.empty(0, 3)
        optimizer = cls([p, p], **row.rich)
        optimizer.step()
        assert steps(optimizer) == [2.0]


def test_lazily_cloned_counter(row: Row) -> None:
    """A write to a copy-on-write counter does not reach what it was cloned from."""
    twins = Twins(row, parameters((131,), (5,)), **row.rich).run(1)
    originals = []
    for optimizer in twins.sides:
        for own in optimizer.state.values():
            originals.append(own["step"])
            own["step"] = torch._lazy_clone(own["step"])
    twins.run(2)
    assert all(step == 1 for step in originals)


# States that are not there, or are another's.


def test_missing_states(row: Row) -> None:
    """Any state but a new parameter's is missed by name, and nothing was written."""
    for name in ("step", *row.states):
        twins = Twins(row, parameters((131,), (5,), (33, 17)), **row.rich).run(2)
        optimizer = twins.ours
        own = optimizer.state[all_params(optimizer)[1]]
        kept = dict(own)
        del own[name]
        snapshot = Snapshot(optimizer)
        with pytest.raises(KeyError) as refused:
            optimizer.step()
        snapshot.assert_unchanged()
        assert f"'{name}'" in str(refused.value)
        assert "param_groups[0]['params'][1]" in str(refused.value)
        own.clear()
        own.update(kept)
        twins.run(2)


def test_option_turned_on_later(row: Row) -> None:
    """An option that needs a state that no step has made: stock's KeyError, of the same name."""
    for change in row.structures[1:]:
        names = {k: v for k, v in change.items() if k in row.structural}
        if not names:
            continue
        twins = Twins(row, parameters((131,), (5,)), **row.plain).run(2)
        words = []
        twins.grads()
        for optimizer in twins.sides:
            optimizer.param_groups[0].update(names)
            with pytest.raises(KeyError) as refused:
                optimizer.step()
            words.append(str(refused.value).strip("'\""))
        assert words[1] in words[0] and words[1] in row.states
        assert all(float(step) == 2 for step in steps(twins.ours))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.ones(2, 7),
        lambda p: torch.ones(p.shape, dtype=torch.int64),
        lambda p: torch.ones(p.shape, dtype=torch.complex64),
        lambda p: torch.ones(p.shape, device="meta"),
        lambda p: "text",
        lambda p: 3.0,
    ],
    ids=["shape", "integers", "complex", "meta", "text", "number"],
)
def test_states_that_do_not_fit(row: Row, make: Callable[[Tensor], Any]) -> None:
    """One sentence that names group, index and state, and nothing was written."""
    for name in row.states:
        twins = Twins(
            row, lambda: [{"params": parameters((5,), (33, 17))()} for _ in "ab"], **row.rich
        ).run(1)
        optimizer = twins.ours
        p = optimizer.param_groups[1]["params"][1]
        optimizer.state[p][name] = make(p)
        snapshot = Snapshot(optimizer)
        with pytest.raises((RuntimeError, TypeError)) as refused:
            optimizer.step()
        snapshot.assert_unchanged()
        said = str(refused.value).splitlines()[0]
        assert "param_groups[1]['params'][1]" in said and f"'{name}'" in said


# Checkpoints.


@pytest.mark.parametrize(**flagged(rows=COUNTING))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back_without_a_step(row: Row, dtype: torch.dtype, flags: Any) -> None:
    """From ours to stock's and back, through a file: nothing has changed, and ours goes on."""
    build = parameters(*ORDINARY_SHAPES, dtype=dtype)
    torch.manual_seed(1)
    ours = row.ours(build(), **row.rich, **flags)
    straight = None
    for step in range(6):
        if step == 3:
            straight = copy.deepcopy(ours)
            stock = row.stock(build(), **row.rich, **flags)
            stock.load_state_dict(through_a_file(ours.state_dict()))
            params = [p.detach().clone().requires_grad_() for p in all_params(ours)]
            ours = row.ours(params, **row.plain)
            ours.load_state_dict(through_a_file(stock.state_dict()))
            for p, q in zip(all_params(ours), all_params(straight), strict=True):
                assert list(ours.state[p]) == list(straight.state[q])
                assert_equal(ours.state[p], straight.state[q])
        for optimizer in filter(None, (ours, straight)):
            torch.manual_seed(step)
            for p in all_params(optimizer):
                p.grad = torch.randn_like(p)
            optimizer.step()
    for p, q in zip(all_params(ours), all_params(straight), strict=True):
        assert_equal(p.detach(), q.detach())
        assert_equal(ours.state[p], straight.state[q])


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    """Save and load what a checkpoint holds, and nothing that a file may not hold."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_steps_from_a_checkpoint(row: Row, dtype: torch.dtype) -> None:
    """A state with any ``step`` in it is the start of one float64 step."""
    optimizer = row.ours(parameters((1025,), dtype=dtype)(), **row.rich)
    (p,) = all_params(optimizer)
    for count in (1, 10, 1000, 100_000):
        p.grad = torch.randn_like(p)
        if p in optimizer.state and count > 1:
            optimizer.state[p]["step"].fill_(count)
        expected = Float64Step(row.stock, optimizer)
        optimizer.step()
        expected.check()
