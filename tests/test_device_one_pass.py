"""Clipping, skipping, averaging and clearing on a device: equal to the CPU's to the last bit.

Where there is no device, the host stands for one, as in ``test_device``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DTYPES, HALVES, ORDINARY_SHAPES, Row
from onepass import INF, NAN, Own, all_dtypes, assert_norm, copies
from oracle import all_params, assert_equal
from places import (
    PLACES,
    Host,
    Place,
    assert_alike,
    emulated,
    give,
    on_host,
    step_both,
    step_here,
    there_and_here,
)
from snapshot import Snapshot
from torch import Tensor
from torch.nn import Parameter
from twins import ORDINARY, parameters, random_grad

import fastsgd
from fastsgd import _C
from fastsgd.bench.device import asked_of_device

# On both sides of a thread's pack, of a chunk and of a piece that is measured.
SIZES = [0, 1, 7, 131, *[n + more for n in (1024, 8192, 16384) for more in (-1, 0, 1)], 40_000]
ALL = {"max_grad_norm": 0.5, "clip_grad_value": 0.02, "ema_decay": 0.9, "clear_grads": "zero"}
WAYS: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 0.5},
    "largest": {"max_grad_norm": 0.5, "norm_type": INF},
    "average": {"ema_decay": 0.9},
    "clear": {"clear_grads": "zero"},
    "all": ALL,
    "skip": {"skip_nonfinite": True, "ema_decay": 0.9, "clear_grads": True},
    "wide": {**ALL, "ema_dtype": torch.float32},
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every place."""
    return request.param


def warming(step: int) -> float:
    """Rise with the number of the average."""
    return step / (step + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_as_on_the_cpu(row: Row, place: Place, way: str, dtype: torch.dtype) -> None:
    """Every size, aligned and not, some grads late, some lost; the norm is the CPU's."""

    def build() -> list[Tensor]:
        params = [Parameter(torch.randn(n, dtype=torch.float64).to(dtype)) for n in SIZES]
        for offset in range(1, 4):
            params.append(Parameter(torch.randn(5000 + offset).to(dtype)[offset:]))
        return params

    pair = there_and_here(place, row, build, **row.rich, **WAYS[way])
    for step in range(4):
        give(pair, step)
        for optimizer in pair:
            for i, p in enumerate(all_params(optimizer)):
                if (i + step) % 5 == 0 and i < len(SIZES):
                    p.grad = None
        grads = copies(p.grad for p in all_params(pair[1]))
        in_parts = way == "wide" and dtype in HALVES and step > 0
        if in_parts:  # averages of those that lost their grad are torch's
            place.do(pair[0].step)
            pair[1].step()
        else:
            step_both(place, pair)
        norms = [optimizer.grad_norm for optimizer in pair]
        if norms[1] is not None:
            assert norms[0].device == place.device
            assert_norm(norms[0].cpu(), grads, WAYS[way].get("norm_type", 2.0))
            if dtype != torch.float64:
                assert_equal(norms[0].cpu(), norms[1])
        if dtype == torch.float64 and "max_grad_norm" in WAYS[way]:
            for p, q in zip(*map(all_params, pair), strict=True):
                torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-14, atol=1e-14)
        else:
            if in_parts and place.device.type != "cpu":  # where torch may round otherwise
                for states in zip(
                    *([o.state[p] for p in all_params(o)] for o in pair), strict=True
                ):
                    there, here = (own.get("ema") for own in states)
                    if there is not None:
                        torch.testing.assert_close(there.cpu(), here)
                        there.copy_(here)
            assert_alike(*pair)


def test_strided(row: Row, place: Place) -> None:
    """Parameters, grads and averages that lie differently in memory."""

    def build() -> list[Tensor]:
        return [
            Parameter(torch.randn(70, 300).t()),
            Parameter(torch.randn(33, 40)[:, ::2]),
            Parameter(torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)),
            Parameter(torch.randn(20_000)[::2]),
        ]

    pair = there_and_here(place, row, build, **row.rich, **ALL)
    for step in range(3):
        for optimizer in pair:
            torch.manual_seed(step)
            for p in all_params(optimizer):
                p.grad = random_grad(torch.empty(p.shape)).to(p.device)
        grads = copies(p.grad for p in all_params(pair[1]))
        step_both(place, pair)
        assert_norm(pair[0].grad_norm.cpu(), grads)
        assert_alike(*pair)


def test_the_norm_has_one_value(row: Row, place: Place) -> None:
    """Whatever the order of parameters and groups, and wherever grads lie."""
    torch.manual_seed(3)
    values = [torch.randn(n) * 10.0 ** (n % 7 - 3) for n in (5, 8191, 8193, 20_000, 70_001, 131)]
    seen = set()
    for offset in range(4):
        for groups in range(1, 4):
            for order in (1, -1):
                grads = []
                for value in values[::order]:
                    memory = torch.zeros(len(value) + offset, device=place.device)
                    memory[offset:] = value
                    grads.append(memory[offset:])
                params = [Parameter(torch.zeros_like(grad)) for grad in grads]
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                optimizer = row.ours(
                    [{"params": params[g::groups]} for g in range(groups)],
                    **row.plain,
                    max_grad_norm=1.0,
                )
                place.step(optimizer)
                seen.add(optimizer.grad_norm.item())
    assert len(seen) == 1


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1.0, 1e150, 1e200], ids=str)
def test_squares_out_of_range(place: Place, row: Row, scale: float) -> None:
    """Of doubles, beside others."""
    torch.manual_seed(4)
    params = place.bring(parameters((9000,), (3,), dtype=torch.float64)())
    for p, by in zip(params, (scale, 1e-170), strict=True):
        p.grad = torch.randn_like(p) * by
    optimizer = row.ours(params, **row.plain, max_grad_norm=1.0)
    place.step(optimizer)
    assert_norm(optimizer.grad_norm.cpu(), [p.grad.cpu() for p in params])


@pytest.mark.parametrize("clear", [False, True, "zero"])
@pytest.mark.parametrize("decay", [0.9, warming], ids=["constant", "rising"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_skipped_steps(row: Row, place: Place, value: float, decay: Any, clear: Any) -> None:
    """They leave values, counters and averages, also the first; and are counted."""
    extras = {"skip_nonfinite": True, "ema_decay": decay, "clear_grads": clear}
    dtypes = (torch.bfloat16, torch.float32)  # a launch each
    build = all_dtypes(*ORDINARY_SHAPES, (9000,), dtypes=dtypes)
    pair = there_and_here(place, row, build, **row.rich, **extras, max_grad_norm=2.0)
    skipped = 0
    for step, overflow in enumerate([True, False, True, True, False, False]):
        give(pair, step)
        held = [[p.grad for p in all_params(optimizer)] for optimizer in pair]
        if overflow:
            for grads in held:
                grads[-1][8500] = value
        before = copies(all_params(pair[0]))
        step_both(place, pair)
        skipped += overflow
        assert [optimizer.skipped_steps for optimizer in pair] == [skipped] * 2
        assert bool(pair[0].grad_norm.isfinite()) is not overflow
        if overflow:
            assert_equal(copies(all_params(pair[0])), before)
        if step:
            assert_alike(*pair)
        for p, grad in zip(all_params(pair[0]), held[0], strict=True):
            assert (p.grad is None) if clear is True else (p.grad is grad)
            assert clear != "zero" or not grad.any()
    counted = [o.state_dict()["param_groups"][0]["ema_steps"] for o in pair]
    assert counted == [3, 3]


@pytest.mark.parametrize("clear", [False, "zero"])
def test_under_a_scaler(row: Row, place: Place, clear: Any) -> None:
    """The norm is that of unscaled grads, which are not written; what it skips is not counted."""
    extras = {"max_grad_norm": 0.5, "ema_decay": warming, "clear_grads": clear}
    pair = there_and_here(place, row, ORDINARY, **row.rich, **extras)
    for step, found_inf in enumerate((1.0, 0.0, 0.0, 1.0, 0.0)):
        give(pair, step, 1024)
        grads = copies(p.grad for p in all_params(pair[1]))
        for optimizer, device in zip(pair, (place.device, "cpu"), strict=True):
            optimizer.grad_scale = torch.tensor(1024.0, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
        step_both(place, pair)
        if not clear:
            assert_equal([p.grad.cpu() for p in all_params(pair[0])], grads)
        if step:
            assert_alike(*pair)
            assert_equal(pair[0].grad_norm.cpu(), pair[1].grad_norm)
        elif clear:
            assert not any(p.grad.any() for p in all_params(pair[0]))
    assert [optimizer.skipped_steps for optimizer in pair] == [0, 0]
    assert pair[0].state_dict()["param_groups"][0]["ema_steps"] == 3


def test_a_schedule_that_raises(row: Row, place: Place) -> None:
    """It is asked for the same average again."""
    asked: list[int] = []

    def decay(number: int) -> float:
        asked.append(number)
        if len(asked) == 3:
            raise ArithmeticError
        return 0.5

    optimizer = row.ours(place.bring(parameters((131,))()), **row.rich, ema_decay=decay)
    for step in range(5):
        give([optimizer], step)
        if step == 2:
            with pytest.raises(ArithmeticError):
                place.step(optimizer)
        else:
            place.step(optimizer)
    assert asked == [1, 2, 3, 3, 4]
    assert optimizer.state_dict()["param_groups"][0]["ema_steps"] == 4


def test_averages_asked_for_later(row: Row, place: Place) -> None:
    """States and counters go on as they are."""
    pair = there_and_here(place, row, ORDINARY, **row.rich)
    for step in range(6):
        for optimizer in pair:
            optimizer.ema_decay = None if step < 2 or step == 4 else warming
        give(pair, step)
        step_both(place, pair)
        assert_alike(*pair)


def test_there_and_here_again(row: Row, place: Place) -> None:
    """The number of averages moves with the parameters, in checkpoints too."""
    extras = {"ema_decay": warming, "max_grad_norm": 1.0}
    there, here = there_and_here(Host(), row, ORDINARY, **row.rich, **extras)
    for step in range(6):
        to = place.device if step % 2 else torch.device("cpu")
        for p in all_params(there):
            p.data = p.data.to(to)
        if step % 3:
            there.load_state_dict(there.state_dict())
        for states in there.state.values():
            for name, value in states.items():
                if isinstance(value, Tensor):
                    states[name] = value.to(to)
        give((there, here), step)
        place.step(there) if step % 2 else step_here(there)
        step_here(here)
        assert_alike(there, here)


def test_the_count_stays_where_it_is(row: Row, place: Place) -> None:
    """A graph may count on it: steps without grads, and those with a part in torch's code."""
    options = row.sparse[0] if row.sparse else row.plain
    params = place.bring(parameters((9,), (33, 17))())
    optimizer = row.ours(params, **options, ema_decay=0.5)
    give([optimizer], 0)
    place.step(optimizer)
    optimizer._ema_steps = int(optimizer._ema_steps)  # as a checkpoint leaves it
    with torch.inference_mode():
        place.step(optimizer)
    count = optimizer._ema_steps
    optimizer.zero_grad()
    place.do(optimizer.step)
    give([optimizer], 1)
    if row.sparse:
        params[1].grad = params[1].grad.to_sparse()
    place.do(optimizer.step)
    assert isinstance(count, Tensor) and optimizer._ema_steps.data_ptr() == count.data_ptr()
    assert int(count) == 4


@on_host
def test_a_checkpoint_after_a_skipped_first_step(row: Row) -> None:
    """It has no average yet, and whoever loads it begins with the next step."""
    params = parameters((9,), (33, 17))()
    optimizer = row.ours(params, **row.rich, ema_decay=0.5, skip_nonfinite=True)
    for p in params:
        p.grad = torch.full_like(p, INF)
    Host().do(optimizer.step)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["ema_steps"] == 0
    other = row.ours(copies(params), **row.rich, ema_decay=0.5)
    other.load_state_dict(saved)
    give([other], 1)
    Host().do(other.step)
    for p in all_params(other):
        assert_equal(other.state[p]["ema"], p.detach())


@on_host
def test_a_capture_makes_nothing(row: Row) -> None:
    """States and averages would be made anew by every replay."""
    params = parameters((9,), (33, 17))()
    optimizer = row.ours(params, **row.rich, max_grad_norm=1.0)
    give([optimizer], 0)
    before = Snapshot(optimizer)

    def refused() -> None:
        with emulated(captures=True), pytest.raises(RuntimeError, match="Take one step before"):
            optimizer.step()

    if not row.eager:
        refused()
        before.assert_unchanged()
    Host().step(optimizer)
    optimizer.ema_decay = 0.5
    refused()
    Host().step(optimizer)
    with emulated(captures=True):
        optimizer.step()
    assert int(optimizer._ema_steps) == 2


@on_host
def test_nothing_is_read_in_a_capture(row: Row) -> None:
    """It would wait for the device; the capture would end in an error that does not say why."""
    params = parameters((9,), (33, 17))()
    optimizer = row.ours(params, **row.rich, skip_nonfinite=True)
    give([optimizer], 0)
    params[0].grad[3] = torch.inf
    Host().step(optimizer)
    with emulated(captures=True), pytest.raises(RuntimeError, match="Ask before or after"):
        optimizer.skipped_steps  # noqa: B018
    with emulated():
        assert optimizer.skipped_steps == 1


@on_host
def test_a_capture_makes_nothing_of_a_part(row: Row) -> None:
    """Where torch's code steps some, it has not begun when the kernels find that they cannot."""
    params = [*parameters((9,), (33, 17))(), torch.randn(5).as_subclass(Own).requires_grad_()]
    optimizer = row.ours(params, **row.rich, ema_decay=0.5)
    give([optimizer], 0)
    Host().do(optimizer.step)
    optimizer.load_state_dict(optimizer.state_dict())  # the count is a number
    before = Snapshot(optimizer)
    with emulated(captures=True), pytest.raises(RuntimeError, match="averages of ema_decay begin"):
        optimizer.step()
    before.assert_unchanged()


def launches(place: Place, act: Any) -> int:
    """Count the kernels that an act launches."""
    if not isinstance(place, Host):
        return asked_of_device(act)["launches"]
    before = _C.emulated_work()[0]
    act()
    return _C.emulated_work()[0] - before


def test_two_launches_a_dtype(row: Row, place: Place) -> None:
    """One that measures and one that does all the rest."""

    def build() -> Sequence[Tensor]:
        return [p for dtype in DTYPES[:2] for p in parameters((131,), (9000,), dtype=dtype)()]

    optimizer = row.ours(
        place.bring(build()), **row.rich, **{**ALL, "skip_nonfinite": True, "ema_dtype": None}
    )
    for step in range(3):
        give([optimizer], step)
        count = launches(place, lambda: place.do(optimizer.step))
        assert not step or count == 4
    optimizer.max_grad_norm = None
    optimizer.skip_nonfinite = False
    assert launches(place, lambda: place.do(optimizer.step)) == 2


# --- lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, INF])
def test_clip_grad_norm(place: Place, norm_type: float, raises: bool) -> None:
    """Two launches a dtype; what the CPU's does, to the bit; nothing where it raises."""
    made = [p for dtype in DTYPES for p in parameters((131,), (9000,), (70, 30), dtype=dtype)()]
    there = place.bring(made)
    for value in (0.0, INF, NAN):
        for i, p in enumerate(there):
            torch.manual_seed(i)
            p.grad = random_grad(torch.empty(p.shape, dtype=p.dtype)).to(place.device)
            p.grad = p.grad.t().contiguous().t() if p.dim() == 2 else p.grad
            p.grad = None if i == 4 else p.grad
        there[3].grad[7] += value
        here = [Parameter(p.detach().cpu().clone()) for p in there]
        for p, q in zip(here, there, strict=True):
            p.grad = None if q.grad is None else q.grad.cpu().clone()
        before = copies(p.grad for p in here)
        norms: list[Tensor] = []

        def clip(params: list[Tensor], norms: list[Tensor] = norms) -> None:
            norms.append(fastsgd.clip_grad_norm_(params, 0.5, norm_type, raises))

        if raises and value:
            with pytest.raises(RuntimeError, match="non-finite"):
                place.do(lambda: clip(there))
            assert_equal([None if p.grad is None else p.grad.cpu() for p in there], before)
            continue
        count = launches(place, lambda: place.do(lambda: clip(there)))
        # To look at the norm before the grads are scaled, torch launches kernels of its own.
        assert count == 2 * len(DTYPES) or (raises and not isinstance(place, Host))
        clip(here)
        assert norms[0].device == place.device
        assert_norm(norms[0].cpu(), before, norm_type)
        for p, q in zip(there, here, strict=True):
            if q.grad is not None:  # the norm of doubles may differ in its last digit
                rtol = 1e-15 if q.dtype == torch.float64 else 0
                torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=rtol, atol=0, equal_nan=True)


def test_averages_in_use(row: Row, place: Place) -> None:
    """What they hold changes places, in a launch a dtype."""
    made = [p for dtype in DTYPES[:2] for p in parameters(*ORDINARY_SHAPES, dtype=dtype)()]
    optimizer = row.ours(place.bring(made), **row.plain, ema_decay=0.5)
    for step in range(2):
        give([optimizer], step)
        place.step(optimizer)
    params = all_params(optimizer)
    averages = copies(optimizer.state[p]["ema"] for p in params)
    values = copies(params)

    def use() -> None:
        with optimizer.ema_weights():
            assert_equal(copies(params), averages)
            assert_equal(copies(optimizer.state[p]["ema"] for p in params), values)

    assert launches(place, lambda: place.do(use)) >= 4
    assert_equal(copies(params), values)
    assert_equal(copies(optimizer.state[p]["ema"] for p in params), averages)
