"""Steps on a device: equal to the CPU's to the last bit.

Where there is no device, the host stands for one. It runs the tables that a device would get, cut
into chunks, and its kernels' code; so everything here is run twice where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import EXACT, LAYOUTS, Layout, Row
from oracle import all_params, assert_equal
from places import PLACES, Host, Place, assert_alike, give, step_both, step_here, there_and_here
from torch import Tensor
from torch.nn import Parameter
from twins import ORDINARY, parameters, random_grad

import fastsgd
from fastsgd import _C

ALL_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    """Every place."""
    return request.param


def mixed(count: int) -> Any:
    """Return a build of many parameters of all dtypes, in groups of their own options."""

    def build() -> list[dict[str, Any]]:
        shapes = [(), (0,), (3,), (131,), (5, 7), (1024,), (4099,)]
        params = [
            Parameter(torch.randn(shapes[i % 7], dtype=torch.float64).to(ALL_DTYPES[i % 4]))
            for i in range(count)
        ]
        return [{"params": params[g::5], "lr": 0.01 * (g + 1)} for g in range(5)]

    return build


@pytest.mark.parametrize("count", [40, 700, 4500])
def test_argument_sizes(row: Row, place: Place, count: int) -> None:
    """Gradients' addresses in few arguments, in many, and in a table, when there are more."""
    pair = there_and_here(place, row, mixed(count), **row.rich)
    for step in range(3):
        give(pair, step)
        step_both(place, pair)
        assert_alike(*pair)


def test_more_groups_than_arguments_hold(row: Row, place: Place) -> None:
    """Hyper-parameters in a table; they change between steps, as with a scheduler."""

    def build() -> list[dict[str, Any]]:
        return [{"params": parameters((n % 37,))(), "lr": 0.001 * (n + 1)} for n in range(400)]

    pair = there_and_here(place, row, build, **row.rich)
    for step in range(4):
        give(pair, step)
        for optimizer in pair:
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        step_both(place, pair)
        assert_alike(*pair)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_chunks(row: Row, place: Place, dtype: torch.dtype) -> None:
    """Tensors of a chunk, of some, one element more or less; aligned, misaligned, and alike."""

    def build() -> list[Tensor]:
        sizes = [n + more for n in (1024, 16384, 65536) for more in (-1, 0, 1)]
        params = [Parameter(torch.randn(n, dtype=dtype)) for n in sizes]
        for offset in range(1, 5):
            params.append(Parameter(torch.randn(5000 + offset, dtype=dtype)[offset:]))
        return params

    pair = there_and_here(place, row, build, **row.rich)
    for step in range(3):
        give(pair, step)
        step_both(place, pair)
        assert_alike(*pair)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts(row: Row, place: Place, layout: Layout) -> None:
    """Every way to lie in memory, of the parameter and of its grad; nothing beside it is written.

    Lazily negated grads are torch's to step.
    """
    if "negated" in layout.name:
        pytest.skip("torch's own path")

    def build() -> list[Tensor]:
        return [Parameter(layout.param(torch.randn(layout.size + 64)[32:-32]))]

    pair = there_and_here(place, row, build, **row.rich)
    for step in range(3):
        for optimizer in pair:
            torch.manual_seed(step)
            (p,) = all_params(optimizer)
            grad = layout.grad(random_grad(torch.empty(p.shape)))
            p.grad = grad if optimizer is pair[1] else place.param(grad).detach()
        step_both(place, pair)
        for p, q in zip(*map(all_params, pair), strict=True):
            whole = [
                torch.empty(0, device=x.device).set_(x.untyped_storage()).cpu() for x in (p, q)
            ]
            assert_equal(*whole)
        assert_alike(*pair)


def test_more_layouts_than_16_bits_count(row: Row, place: Place) -> None:
    """Tensors that do not lie flat, each a little: every one has a layout of its own."""
    many = torch.randn(2**15 + 10, 3, 4)
    there, here = (
        [Parameter(part[:, :3] if i % 2 else part[:, 1:]) for i, part in enumerate(side)]
        for side in (place.param(many.clone()).detach(), many)
    )
    for p in (*there, *here):
        p.grad = p.detach().clone()
    step_both(place, (row.ours(there, **row.plain), row.ours(here, **row.plain)))
    assert_equal(torch.stack(there).detach().cpu(), torch.stack(here).detach())


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_learning_rate_on_the_device(row: Row, place: Place, dtype: torch.dtype) -> None:
    """The address of a tensor lr is read at each step, its value where the step is done."""
    options = {**row.rich, "lr": torch.tensor(0.1, dtype=dtype)}
    pair = there_and_here(place, row, parameters((1,), (131,), (33, 17)), **options)
    pair[0].param_groups[0]["lr"] = options["lr"].to(place.device, copy=True)
    for step in range(3):
        give(pair, step)
        for optimizer in pair:
            optimizer.param_groups[0]["lr"].mul_(0.5)
        step_both(place, pair)
        assert_alike(*pair)


def test_scaled_gradients(row: Row, place: Place) -> None:
    """grad_scale and found_inf are read on the device: skipped steps leave values and counters."""
    pair = there_and_here(place, row, ORDINARY, **row.rich, **row.fused)
    there, here = pair
    taken = 0
    for step, found_inf in enumerate((1.0, 0.0, 1.0, 1.0, 0.0, 0.0)):
        give(pair, step, 1024)
        for optimizer, device in ((there, place.device), (here, "cpu")):
            optimizer.grad_scale = torch.tensor(1024.0, device=device)
            optimizer.found_inf = torch.tensor(found_inf, device=device)
        before = [p.detach().clone() for p in all_params(there)]
        grads = [p.grad.clone() for p in all_params(there)]
        step_both(place, pair)
        taken += not found_inf
        if found_inf:
            assert_equal([p.detach() for p in all_params(there)], before)
            assert_equal([p.grad for p in all_params(there)], grads)
        if row.counts:
            assert {int(s["step"]) for s in there.state.values()} == {taken}
        if taken:
            assert_alike(*pair)
        else:
            assert row.eager or not any(s[row.states[0]].any() for s in there.state.values())


def test_a_counter_that_stands_still(row: Row, place: Place) -> None:
    """A float32 cannot say more than 2^24; the step is the number that it says, on either side."""
    pair = there_and_here(place, row, parameters((131,), dtype=torch.float64), **row.rich)
    for step in range(3):
        give(pair, step)
        step_both(place, pair)
        for optimizer in pair if step == 0 else ():
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].fill_(2.0**24)
    assert_alike(*pair)


def test_all_options_within_a_unit(row: Row, place: Place) -> None:
    """With tensor betas too, whose powers are computed in double and rounded."""
    for options in row.options:
        pair = there_and_here(place, row, parameters((131,)), **options)
        for step in range(5):
            give(pair, step)
            step_both(place, pair)
        for p, q in zip(*map(all_params, pair), strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)


def test_a_model_that_moves(row: Row, place: Place) -> None:
    """To the device and back, states and all: it goes on as if it had not."""
    there, here = there_and_here(Host(), row, ORDINARY, **row.rich)
    for step in range(6):
        to = place.device if step % 2 else torch.device("cpu")
        for p in all_params(there):
            p.data = p.data.to(to)
        there.load_state_dict(there.state_dict())  # brings states to their parameters
        for states in there.state.values():
            if "step" in states and to.type == "cpu":
                states["step"] = states["step"].cpu()
        give((there, here), step)
        place.step(there) if step % 2 else step_here(there)
        step_here(here)
        assert_alike(there, here)


# --- zero_grad ----------------------------------------------------------------------------------


def test_zeros(row: Row, place: Place) -> None:
    """Grads of every dtype and alignment, over chunks of bytes; nothing beside them is written."""
    params, around = [], []
    for dtype in ALL_DTYPES:
        for n in (0, 1, 3, 7, 8, 9, 131, 16383, 16385, 65537, 140_001):
            for offset in range(3):
                memory = torch.full((n + 8,), 3, dtype=dtype, device=place.device)
                p = Parameter(torch.zeros(n, dtype=dtype, device=place.device))
                p.grad = memory[offset : offset + n]
                params.append(p)
                around.append((memory, offset, n))
    optimizer = row.ours([{"params": params[g::3]} for g in range(3)], **row.plain)
    versions = [p.grad._version for p in params]
    for _ in range(2):
        place.zero_grad(optimizer)
        for memory, offset, n in around:
            values = memory.float().cpu()
            assert not values[offset : offset + n].any()
            values[offset : offset + n] = 3
            assert (values == 3).all()
            memory.fill_(3)
    assert all(p.grad._version > v for p, v in zip(params, versions, strict=True))


def test_a_step_between_zeros(row: Row, place: Place) -> None:
    pair = there_and_here(place, row, mixed(60), **row.rich)
    give(pair, 0)
    for step in range(4):
        for optimizer in pair:
            torch.manual_seed(step)
            for p in all_params(optimizer):
                p.grad.add_(random_grad(p))
        step_both(place, pair)
        assert_alike(*pair)
        place.zero_grad(pair[0])
        pair[1].zero_grad(set_to_none=False)
        assert_alike(*pair)


# --- how much work ------------------------------------------------------------------------------


def work_of(act: Any) -> tuple[int, int]:
    """Return how many launches and uploads an act takes, of the host that stands for a device."""
    before = _C.emulated_work()
    act()
    after = _C.emulated_work()
    return after[0] - before[0], after[1] - before[1]


def test_one_launch_a_dtype(row: Row) -> None:
    """However many tensors and groups; what has not changed is not sent again."""
    host = Host()
    params = [torch.zeros(2, dtype=ALL_DTYPES[i % 2], requires_grad=True) for i in range(10_000)]
    optimizer = row.ours([{"params": params[g::465]} for g in range(465)], **row.rich)
    for _ in range(2):
        give([optimizer], 1)
        host.step(optimizer)
    assert work_of(lambda: host.step(optimizer)) == (2, 0)
    kept = [p.grad for p in params]  # so that the new ones lie elsewhere
    give([optimizer], 1)
    assert work_of(lambda: host.step(optimizer)) == (2, 2)
    del kept
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert work_of(lambda: host.step(optimizer)) == (2, 0)
    for number, group in enumerate(optimizer.param_groups):  # a table of them
        group["lr"] *= 1 + number
    assert work_of(lambda: host.step(optimizer)) == (2, 3)
    assert work_of(lambda: host.step(optimizer)) == (2, 0)


def test_fewer_gradients_travel_in_the_arguments(row: Row) -> None:
    host = Host()
    optimizer = row.ours([torch.zeros(2, requires_grad=True) for _ in range(1000)], **row.plain)
    for _ in range(2):
        give([optimizer], 1)
        host.step(optimizer)
    kept = [p.grad for p in all_params(optimizer)]
    give([optimizer], 1)
    assert work_of(lambda: host.step(optimizer)) == (1, 0)
    del kept


def test_zeros_take_one_launch(row: Row) -> None:
    """For all dtypes together; and they leave the tables of a step alone."""
    host = Host()
    params = [torch.zeros(2, dtype=ALL_DTYPES[i % 4], requires_grad=True) for i in range(100)]
    optimizer = row.ours(params, **row.plain)
    give([optimizer], 1)
    for _ in range(2):
        host.step(optimizer)
        host.zero_grad(optimizer)
    assert work_of(lambda: host.zero_grad(optimizer)) == (1, 0)
    assert work_of(lambda: host.step(optimizer)) == (4, 0)


def test_what_a_build_has() -> None:
    tensors = [torch.ones(2), torch.ones(2, device="meta"), torch.ones(3)]
    assert _C.devices_of(tensors) == [torch.device("cpu"), torch.device("meta")]
    assert _C.has_kernels_for(torch.device("cpu"))
    assert not _C.has_kernels_for(torch.device("xpu", 0))
    assert not _C.has_kernels_for(torch.device("meta"))
    if fastsgd.cuda_available():
        assert _C.has_kernels_for(torch.device("cuda", 0))
