"""``ema_decay``: averages beside those of ``AveragedModel``; saved, loaded, copied."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cases import DTYPES, EXACT, HALVES, LARGER, ORDINARY_SHAPES, SIZES, Row
from onepass import INF, Averages, ClippedStep, Extended, Own, all_dtypes, copies, unit
from oracle import all_params, assert_equal
from snapshot import Snapshot
from torch.nn import Parameter
from twins import Twins, parameters, random_grad

SHAPES = (*ORDINARY_SHAPES, *[(n,) for n in SIZES])
BUILD = parameters(*SHAPES)


def warming(step: int) -> float:
    """Rise with the number of the step, as schedules do; a module's function can be pickled."""
    return min(0.99, (1 + step) / (10 + step))


DECAYS = (0, 0.3, 0.5, 0.9, 0.999, 1, warming)


def named(decay: Any) -> str:
    """Return a test id."""
    return getattr(decay, "__name__", str(decay))


every_decay = pytest.mark.parametrize("decay", DECAYS, ids=named)


def run(optimizer: Any, averages: Averages | None, steps: int, seed: int = 0) -> None:
    """Step with random grads, and compare the averages each time."""
    for step in range(steps):
        torch.manual_seed(seed + step)
        for p in all_params(optimizer):
            p.grad = random_grad(p)
        if averages:
            averages.watch()
        optimizer.step()
        if averages:
            averages.check()


def all_of(optimizer: Any) -> list[Any]:
    """Return copies of parameters and states."""
    states = [optimizer.state.get(p, {}) for p in all_params(optimizer)]
    return [copies(all_params(optimizer)), [copy.deepcopy(dict(own)) for own in states]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_decay
def test_as_averaged_model(row: Row, decay: Any, dtype: torch.dtype) -> None:
    """Each step's averages are torch's, and the steps are those without averages."""
    twins = Extended(row, parameters(*SHAPES, dtype=dtype), {"ema_decay": decay}, **row.rich)
    averages = Averages(twins.ours, decay)
    for _ in range(8):
        twins.grads()
        averages.watch()
        expected = ClippedStep(row, twins.ours) if dtype in HALVES else None
        twins.step()
        twins.check()
        averages.check()
        if expected:
            expected.check()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_decay
def test_halves_in_single_precision(row: Row, decay: Any, dtype: torch.dtype) -> None:
    """``ema_dtype`` keeps what a half type would round away; it is for halves alone."""
    build = all_dtypes(*SHAPES, dtypes=(dtype, *EXACT))
    optimizer = row.ours(build(), **row.rich, ema_decay=decay, ema_dtype=torch.float32)
    run(optimizer, Averages(optimizer, decay, torch.float32), 8)
    for p in all_params(optimizer):
        wide = torch.float32 if p.dtype == dtype else p.dtype
        assert optimizer.state[p]["ema"].dtype == wide


@pytest.mark.parametrize("to", [torch.float32, None], ids=str)
def test_another_dtype_from_now_on(row: Row, to: Any) -> None:
    """``ema_dtype`` may be set between steps: the averages of halves go on in the other dtype."""
    was = None if to else torch.float32
    params = all_dtypes(*SHAPES, dtypes=DTYPES)()
    strange = torch.randn(5, 7).bfloat16().as_subclass(Own).requires_grad_()
    optimizer = row.ours([*params, strange], **row.rich, ema_decay=0.9, ema_dtype=was)
    run(optimizer, None, 2)
    states = [optimizer.state[p] for p in all_params(optimizer)]
    before = [own["ema"].clone() for own in states]
    with optimizer.ema_weights():
        with pytest.raises(RuntimeError, match=r"setting ema_dtype inside ema_weights\(\)"):
            optimizer.ema_dtype = to
    assert optimizer.ema_dtype is was
    assert_equal([own["ema"] for own in states], before)
    optimizer.ema_dtype = to
    averages = Averages(optimizer, 0.9, to)
    averages.model.n_averaged.fill_(2)
    for p, own, old, average in zip(
        all_params(optimizer), states, before, averages.model.parameters(), strict=True
    ):
        assert_equal(own["ema"], old.to(to or p.dtype) if p.dtype in HALVES else old)
        average.data.copy_(own["ema"])
    run(optimizer, averages, 3)


@pytest.mark.parametrize(
    ("threads", "wide"), [(1, None), (2, None), (2, torch.float32)], ids=["1", "2", "2-wide"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_strided(row: Row, dtype: torch.dtype, threads: int, wide: Any) -> None:
    """Chunks, threads, and parameters that are views: gaps between their elements stay."""
    torch.set_num_threads(threads)
    memory = torch.full((301, 65), 7.0, dtype=dtype)
    views = [memory[:, 1:34], torch.randn(33, 129).to(dtype).t()]
    views[0].copy_(torch.randn(301, 33))
    params = [*map(Parameter, views), *parameters(*[(n,) for n in LARGER], dtype=dtype)()]
    params += parameters((1_000_003,), dtype=dtype)()
    optimizer = row.ours(params, **row.rich, ema_decay=0.9, ema_dtype=wide)
    run(optimizer, Averages(optimizer, 0.9, wide), 3)
    marks = torch.ones_like(memory, dtype=torch.bool)
    marks[:, 1:34] = False
    with optimizer.ema_weights():
        assert bool((memory[marks] == 7).all())
    assert bool((memory[marks] == 7).all())


@pytest.mark.parametrize("decay", [0.9, warming], ids=named)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grads_that_come_late_and_go(row: Row, dtype: torch.dtype, decay: Any) -> None:
    """A first grad starts from the value before the step; without a grad averaging goes on."""
    optimizer = row.ours(
        parameters((33,), (257,), (17, 3), (5,), dtype=dtype)(), **row.rich, ema_decay=decay
    )
    averages = Averages(optimizer, decay)
    # At which steps each has a grad.
    having = [range(8), range(2), range(3, 5), (0, 6)]
    for step in range(8):
        for p, steps in zip(all_params(optimizer), having, strict=True):
            p.grad = random_grad(p) if step in steps else None
        averages.watch()
        optimizer.step()
        averages.check()
    assert all(averages.seen)


def test_a_subclass_that_loses_its_grad(row: Row) -> None:
    """It goes on being averaged, as a plain tensor does."""
    plain = parameters((33,), (5, 7))()
    foreign = [p.detach().clone().as_subclass(Own).requires_grad_() for p in plain]
    pair = [row.ours(each, **row.rich, ema_decay=0.5) for each in (plain, foreign)]
    for step in range(5):
        for i in range(2):
            grad = random_grad(plain[i]) if step < 3 - i else None
            for each in (plain, foreign):
                each[i].grad = None if grad is None else grad.clone()
        for optimizer in pair:
            optimizer.step()
        for p, q in zip(plain, foreign, strict=True):
            ours, theirs = (o.state[x]["ema"] for o, x in zip(pair, (p, q), strict=True))
            torch.testing.assert_close(ours, theirs.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_named_twice(row: Row) -> None:
    """It is stepped twice in a step, and averaged once."""
    p = parameters((33,))()[0]
    optimizer = row.ours([p, p], **row.rich, ema_decay=0.5)
    expected = None
    for _ in range(4):
        p.grad = random_grad(p)
        optimizer.step()
        now = p.detach().clone()
        expected = now if expected is None else expected.lerp(now, 0.5)
        assert_equal(optimizer.state[p]["ema"], expected)


def test_skipped_steps_are_no_averaging_steps(row: Row) -> None:
    """Neither the averages nor the number that the schedule gets go on."""
    extras = {"ema_decay": warming, "skip_nonfinite": True}
    twins = Extended(row, BUILD, extras, **row.rich)
    averages = Averages(twins.ours, warming)
    for overflow in (True, False, True, True, False, False):
        twins.grads()
        if overflow:
            all_params(twins.ours)[0].grad[32, 16] = INF
            snapshot = Snapshot(twins.ours)
            twins.step()
            snapshot.assert_unchanged()
        else:
            averages.watch()
            twins.step()
            averages.check()
    assert twins.ours.state_dict()["param_groups"][0]["ema_steps"] == 3


def test_begun_in_the_middle(row: Row) -> None:
    """An optimizer told to average after some steps starts with the parameters of the next."""
    twins = Extended(row, BUILD, {}, **row.rich).run(3)
    assert not any("ema" in own for own in twins.ours.state.values())
    assert "ema_steps" not in twins.ours.state_dict()["param_groups"][0]
    twins.ours.ema_decay = 0.5
    run(twins.ours, Averages(twins.ours, 0.5), 3)


# Checkpoints and copies.


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(optimizer: Any, row: Row, extras: Any) -> Any:
    """Return a new optimizer over copies of the parameters, with the state loaded from a file."""
    groups = [copies(group["params"]) for group in optimizer.param_groups]
    parts = [{"params": [Parameter(p) for p in group]} for group in groups]
    other = row.ours(parts, **row.plain, **extras)
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


def copied(optimizer: Any, row: Row, extras: Any) -> Any:
    return copy.deepcopy(optimizer)


def pickled(optimizer: Any, row: Row, extras: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [0.9, warming], ids=named)
@pytest.mark.parametrize("way", [reloaded, copied, pickled], ids=lambda f: f.__name__)
def test_goes_on_elsewhere(row: Row, way: Any, decay: Any, dtype: Any, steps: int) -> None:
    """A checkpoint or copy steps on as if nothing had happened, with the same average and count."""
    extras = {"ema_decay": decay, "ema_dtype": dtype}
    groups = [
        {"params": all_dtypes((33,), (5, 17))()},
        {"params": parameters((257,))(), "lr": 0.01},
    ]
    optimizer = row.ours(groups, **row.rich, **extras)
    run(optimizer, None, steps)
    other = way(optimizer, row, extras)
    assert_equal(all_of(other), all_of(optimizer))
    for p in all_params(other):
        own, wide = other.state.get(p, {}), dtype if dtype and p.dtype in HALVES else p.dtype
        assert not steps or own["ema"].dtype == wide
    for each in (optimizer, other):
        run(each, None, 3, seed=7)
        assert not any("ema_steps" in group for group in each.param_groups)
    assert_equal(all_of(other), all_of(optimizer))
    for each in (optimizer, other):
        assert [g["ema_steps"] for g in each.state_dict()["param_groups"]] == [steps + 3] * 2


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_stock_loads_it(row: Row, dtype: torch.dtype) -> None:
    """A stock optimizer takes the checkpoint and makes the same steps; ours takes it back."""
    twins = Twins(row, parameters(*ORDINARY_SHAPES, dtype=dtype), **row.rich).run(1)
    twins.ours.ema_decay = warming
    for _ in range(3):
        twins.grads()
        twins.step()
    twins.stock.load_state_dict(through_file(twins.ours.state_dict()))
    for _ in range(3):
        twins.grads()
        twins.step()
        assert_equal(*(copies(all_params(each)) for each in twins.sides))
    twins.ours.load_state_dict(through_file(twins.stock.state_dict()))
    twins.grads()
    twins.step()
    assert_equal(*(copies(all_params(each)) for each in twins.sides))
    assert not any("ema_steps" in group for group in twins.ours.param_groups)


def test_loads_what_stock_saved(row: Row) -> None:
    """A stock checkpoint has no averages: they begin with the next step."""
    twins = Twins(row, BUILD, **row.rich).run(3)
    twins.ours.ema_decay = warming
    twins.ours.load_state_dict(through_file(twins.stock.state_dict()))
    averages = Averages(twins.ours, warming)
    for _ in range(3):
        twins.grads()
        averages.watch()
        twins.step()
        averages.check()
        assert_equal(*(copies(all_params(each)) for each in twins.sides))


def test_a_flat_checkpoint_that_has_none(row: Row) -> None:
    """Where there is no average torch's flattened form has an empty dict: it is none."""
    params = parameters((33,), (5,))()
    optimizer = row.ours(params, **row.rich, ema_decay=0.5)
    saved = row.ours(copy.deepcopy(params), **row.rich)
    run(saved, None, 2)
    state_dict = saved.state_dict()
    for own in state_dict["state"].values():
        own["ema"] = {}
    optimizer.load_state_dict(state_dict)
    assert not any("ema" in own for own in optimizer.state.values())
    run(optimizer, Averages(optimizer, 0.5), 2)


def test_hooks_of_checkpoints(row: Row) -> None:
    """They see the number of averages in the groups, may wrap it all up, and unwrap it again."""
    optimizer = row.ours(BUILD(), **row.rich, ema_decay=0.9)
    run(optimizer, None, 3)
    plain = optimizer.state_dict()
    seen = []

    def wrap(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["param_groups"][0]["ema_steps"])
        return {"wrapped": state_dict}

    asked: list[Any] = []

    def ask(o: Any, _: Any) -> None:
        if not asked:
            asked.append("once")
            asked.append(o.state_dict())

    optimizer.register_state_dict_post_hook(ask)
    last = optimizer.register_state_dict_post_hook(lambda *_: None)
    assert_equal([optimizer.state_dict(), asked[1]], [plain, plain])
    last.remove()
    optimizer.register_state_dict_post_hook(wrap)
    wrapped = optimizer.state_dict()
    assert seen == [3] and list(wrapped) == ["wrapped"]
    other = row.ours(copy.deepcopy(all_params(optimizer)), **row.rich, ema_decay=0.9)
    other.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict["wrapped"])
    other.load_state_dict(wrapped)
    assert_equal(other.state_dict(), plain)


@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
def test_hooks_after_loading(row: Row, wide: Any) -> None:
    """They see averages and their number as loaded: copies, steps and ``ema_weights`` are right."""
    options = {**row.rich, "ema_decay": 0.9, "ema_dtype": wide}
    optimizer = row.ours(all_dtypes((33,), (5,))(), **options)
    run(optimizer, None, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.ours(copy.deepcopy(all_params(optimizer)), **options)
    seen: list[Any] = []

    def look(o: Any) -> None:
        with o.ema_weights():
            seen.append(copies(all_params(o)))
        seen.append(copy.deepcopy(o))
        seen.append(copy.deepcopy(o.state_dict()))

    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(saved)
    weights, copied, again = seen
    assert_equal(again, saved)
    assert_equal(copied.state_dict(), saved)
    assert not any("ema_steps" in group for group in copied.param_groups)
    with optimizer.ema_weights():
        assert_equal(weights, copies(all_params(optimizer)))
    for each in (other, copied, optimizer):
        run(each, None, 2)
    assert_equal(other.state_dict(), optimizer.state_dict())
    assert_equal(copied.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("wide", [None, torch.float32], ids=str)
@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_that_loads(row: Row, when: str, wide: Any) -> None:
    """What it loads is loaded whole, and then, before the load that called it ends, so is that."""
    options = {**row.rich, "ema_decay": 0.9, "ema_dtype": wide}
    saves = []
    for steps in (2, 3):
        optimizer = row.ours(all_dtypes((33,), (5,))(), **options)
        run(optimizer, None, steps)
        saves.append(copy.deepcopy(optimizer.state_dict()))
    other = row.ours(copy.deepcopy(all_params(optimizer)), **options)
    within: list[Any] = []

    def load(o: Any, _: Any = None) -> None:
        if not within:
            within.append("once")
            o.load_state_dict(saves[0])
            within.append(copy.deepcopy(o.state_dict()))

    calls: list[str] = []
    for hook in (load, lambda *_: calls.append("after")):
        getattr(other, f"register_load_state_dict_{when}_hook")(hook)
    other.load_state_dict(saves[1])
    assert_equal(within[1], saves[0])
    assert_equal(other.state_dict(), saves[1 if when == "pre" else 0])
    assert calls == ["after"] * 2
    other.load_state_dict(saves[1])
    assert_equal(other.state_dict(), saves[1])


def test_hooks_that_come_first_and_last(row: Row) -> None:
    """Whenever registered: ours see what is loaded in the end, and others what ours make of it."""
    options = {**row.rich, "ema_decay": 0.9, "ema_dtype": torch.float32}
    optimizer = row.ours(all_dtypes((33,), (5,))(), **options)
    run(optimizer, None, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other = row.ours(copy.deepcopy(all_params(optimizer)), **options)
    seen: list[Any] = []

    def note(_: Any, state_dict: dict[str, Any]) -> None:
        seen.append(state_dict["param_groups"][0]["ema_steps"])

    def look(o: Any) -> None:
        seen.append(copy.deepcopy(o.state_dict()))

    other.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["wrapped"])
    other.register_load_state_dict_post_hook(look, prepend=True)
    other.register_state_dict_post_hook(note, prepend=True)
    other.load_state_dict({"wrapped": saved})
    assert seen[0] == 3
    assert_equal(seen[1], saved)


def test_group_added_later(row: Row) -> None:
    """Its parameters start from their values, at the count that the others have reached."""
    optimizer = row.ours(parameters((33, 5), (257,))(), **row.rich, ema_decay=warming)
    run(optimizer, None, 2)
    optimizer.add_param_group({"params": parameters((17,), (65,))()})
    starts = [optimizer.state.get(p, {}).get("ema", p) for p in all_params(optimizer)]
    before = copies(starts)
    run(optimizer, None, 1)
    for p, was in zip(all_params(optimizer), before, strict=True):
        mine, right = optimizer.state[p]["ema"], torch.lerp(was, p.detach(), 1 - warming(3))
        assert bool(((mine - right).abs() <= unit(mine, was, p.detach())).all())
        assert not torch.equal(mine, p.detach()) and not torch.equal(mine, was)
